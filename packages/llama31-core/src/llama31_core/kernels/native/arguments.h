// What a whole model is called with: arrays of addresses, shapes and types in, a model's inputs out.
#pragma once

#include <cstdint>
#include <string>

#include "model.h"
#include "quantized.h"

namespace llama31 {

// The arguments, taken one after the other.
class Arguments {
 public:
  Arguments(void **params, int64_t **shapes, const char **dtypes)
      : params_(params), shapes_(shapes), dtypes_(dtypes) {}

  bool is_quantized = false;  // then a matrix is two arguments

  const int64_t *shape() const { return shapes_[at_]; }  // of the next one
  std::string dtype() const { return dtypes_[at_]; }
  int taken() const { return at_; }
  const int32_t *Ints() { return static_cast<const int32_t *>(params_[at_++]); }
  float *Floats() { return static_cast<float *>(Any()); }
  void *Any() { return params_[at_++]; }

  Stored Matrix() {
    const void *data = Any();
    return {data, is_quantized ? static_cast<const Range *>(Any()) : nullptr};
  }

 private:
  void **params_;
  int64_t **shapes_;
  const char **dtypes_;
  int at_ = 0;
};

inline LayerWeights TakeLayer(Arguments &arguments, Shapes &shapes) {
  LayerWeights layer{};
  layer.attention_norm = arguments.Floats();
  shapes.q_width = arguments.shape()[0];
  layer.wq = arguments.Matrix();
  shapes.kv_width = arguments.shape()[0];
  layer.wk = arguments.Matrix(), layer.wv = arguments.Matrix(), layer.wo = arguments.Matrix();
  layer.ffn_norm = arguments.Floats();
  shapes.ffn = arguments.shape()[0];
  layer.w1 = arguments.Matrix(), layer.w2 = arguments.Matrix(), layer.w3 = arguments.Matrix();
  shapes.kv_heads = arguments.shape()[1], shapes.width = arguments.shape()[2];
  layer.has_bf16_cache = arguments.dtype() == "bfloat16";
  layer.keys = arguments.Any(), layer.values = arguments.Any();
  return layer;
}

template <typename MatrixKind, typename TableKind>
struct KindsOf {
  using Matrix = MatrixKind;
  using Table = TableKind;
};

// use(inputs, kinds, logits) for the kinds of matrices that layers, and embedding and head, have.
//
// tokens, positions, slots (B, T), tables (B, M), wanted (N,), settings (3,), frequencies (D / 2,), norm_out (E,),
// embedding (V, E), head (V, E); then of each layer attention_norm (E,), wq, wk, wv, wo, ffn_norm (E,), w1, w2, w3, key
// and value cache (C, K, D), float32 or bfloat16; then the output, logits (N, V). A quantised matrix is its
// numbers and ranges. Returns 1 if the number of arguments is another one.
template <typename Use>
int WithModel(int nparam, void **params, int64_t **shapes, const char **dtypes, const Use &use) {
  Arguments arguments(params, shapes, dtypes);
  arguments.is_quantized = std::string(dtypes[8]) == "int8";
  ModelInputs in{};
  in.shapes.batch = shapes[0][0], in.shapes.tokens = shapes[0][1], in.shapes.table_length = shapes[3][1];
  in.wanted_rows = shapes[4][0], in.shapes.dim = shapes[7][0], in.vocabulary = shapes[8][0];
  in.tokens = arguments.Ints(), in.positions = arguments.Ints(), in.slots = arguments.Ints();
  in.tables = arguments.Ints(), in.wanted = arguments.Ints();
  in.settings = arguments.Floats(), in.frequencies = arguments.Floats(), in.norm_out = arguments.Floats();
  in.embedding = arguments.Matrix(), in.head = arguments.Matrix();
  const std::string layer_type = dtypes[arguments.taken() + 1];
  while (arguments.taken() < nparam - 1) in.layers.push_back(TakeLayer(arguments, in.shapes));
  if (arguments.taken() != nparam - 1) return 1;
  float *logits = arguments.Floats();
  if (layer_type == "uint8") {
    use(in, KindsOf<QuantizedMatrix<Bits4>, QuantizedMatrix<Bits8>>{}, logits);
  } else if (layer_type == "int8") {
    use(in, KindsOf<QuantizedMatrix<Bits8>, QuantizedMatrix<Bits8>>{}, logits);
  } else if (layer_type == "bfloat16") {
    use(in, KindsOf<PlainMatrix<Bf16>, PlainMatrix<Bf16>>{}, logits);
  } else {
    use(in, KindsOf<PlainMatrix<float>, PlainMatrix<float>>{}, logits);
  }
  return 0;
}

}  // namespace llama31
