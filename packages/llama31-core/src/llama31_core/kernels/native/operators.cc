// A Llama model as a MindSpore custom operator for a CPU with AVX-512 and its bfloat16 dot product.

#include <cstdint>
#include <string>
#include <vector>

#include "model.h"

namespace mindspore {
class AotExtra;
}

using namespace llama31;

namespace {

constexpr int kModelInputs = 10, kLayerInputs = 11;

const float *Floats(const void *data) { return static_cast<const float *>(data); }
const int32_t *Ints(const void *data) { return static_cast<const int32_t *>(data); }

LayerWeights LayerOf(void **params) {
  return {Floats(params[0]), params[1], params[2], params[3], params[4], Floats(params[5]), params[6], params[7],
          params[8], static_cast<float *>(params[9]), static_cast<float *>(params[10])};
}

}  // namespace

// How many threads the loops take. Before the first pass.
extern "C" void Llama31SetNumThreads(int count) { ThreadPool::num_threads = count; }

// tokens, positions, slots (B, T), tables (B, M), wanted (N,), settings (2,), frequencies (D / 2,), embedding (V, E),
// norm_out (E,), head (V, E); then of each layer attention_norm (E,), wq, wk, wv, wo, ffn_norm (E,), w1, w2, w3, key
// and value cache (C, K, D) -> logits (N, V). Returns 1 if it was called with another number of arguments.
extern "C" int Llama31Model(int nparam, void **params, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  const int num_layers = (nparam - 1 - kModelInputs) / kLayerInputs;
  if (num_layers < 1 || nparam != kModelInputs + num_layers * kLayerInputs + 1) return 1;
  int64_t **layer = shapes + kModelInputs;
  ModelInputs in{};
  in.tokens = Ints(params[0]), in.positions = Ints(params[1]), in.slots = Ints(params[2]);
  in.tables = Ints(params[3]), in.wanted = Ints(params[4]);
  in.settings = Floats(params[5]), in.frequencies = Floats(params[6]);
  in.embedding = params[7], in.norm_out = Floats(params[8]), in.head = params[9];
  in.wanted_rows = shapes[4][0], in.vocabulary = shapes[9][0];
  in.shapes.batch = shapes[0][0], in.shapes.tokens = shapes[0][1], in.shapes.table_length = shapes[3][1];
  in.shapes.dim = shapes[7][1], in.shapes.q_width = layer[1][0], in.shapes.kv_width = layer[2][0];
  in.shapes.ffn = layer[6][0], in.shapes.kv_heads = layer[9][1], in.shapes.width = layer[9][2];
  for (int i = 0; i < num_layers; ++i) in.layers.push_back(LayerOf(params + kModelInputs + i * kLayerInputs));
  float *logits = static_cast<float *>(params[nparam - 1]);
  if (std::string(dtypes[7]) == "bfloat16") {
    Model<Bf16>(in).Run(logits);
  } else {
    Model<float>(in).Run(logits);
  }
  return 0;
}

extern "C" std::vector<int64_t> Llama31ModelInferShape(int *, int64_t **shapes, mindspore::AotExtra *) {
  return {shapes[4][0], shapes[9][0]};
}
