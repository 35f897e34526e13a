// A Llama model for a CPU with AVX2, or with AVX-512, VBMI and the bfloat16 dot product.

#include <cstdint>

#include "arguments.h"

using namespace llama31;

// How many threads the loops take. Before the first pass.
extern "C" void Llama31SetNumThreads(int count) { ThreadPool::num_threads = count; }

// The arguments of arguments.h -> logits (N, V). Returns 1 if it was called with another number of arguments.
extern "C" int Llama31Model(int nparam, void **params, int64_t **shapes, const char **dtypes) {
  return WithModel(nparam, params, shapes, dtypes, [](const ModelInputs &in, auto kinds, float *logits) {
    using Kinds = decltype(kinds);
    Model<typename Kinds::Matrix, typename Kinds::Table>(in).Run(logits);
  });
}
