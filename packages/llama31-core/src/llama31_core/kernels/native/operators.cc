// A Llama model as a MindSpore custom operator for a CPU with AVX2, or with AVX-512 and its bfloat16 dot product.

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace mindspore {
class AotExtra;
}

using namespace llama31;

// How many threads the loops take. Before the first pass.
extern "C" void Llama31SetNumThreads(int count) { ThreadPool::num_threads = count; }

// The arguments of arguments.h -> logits (N, V). Returns 1 if it was called with another number of arguments.
extern "C" int Llama31Model(int nparam, void **params, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  return WithModel(nparam, params, shapes, dtypes, [](const ModelInputs &in, auto kinds, float *logits) {
    using Kinds = decltype(kinds);
    Model<typename Kinds::Matrix, typename Kinds::Table>(in).Run(logits);
  });
}

extern "C" std::vector<int64_t> Llama31ModelInferShape(int *, int64_t **shapes, mindspore::AotExtra *) {
  return {shapes[4][0], shapes[8][0]};
}
