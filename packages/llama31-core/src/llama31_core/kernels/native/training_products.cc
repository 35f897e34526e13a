// Products with a weight (N, K) in training, forward and backward, in float32.
//
// oneDNN multiplies, without threads of its own: parts of the result go to the pool, whose threads take the next part
// when they are done with one. MindSpore's own operator cuts a product into as many parts as there are threads, and the
// thread that started it spins until the slowest is done.

#include <atomic>
#include <cstdint>

#include "thread_pool.h"

using llama31::ThreadPool;

namespace {

// oneDNN's dnnl_sgemm, for matrices whose rows are contiguous: C = alpha op(A) op(B) + beta C.
using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                      float, float *, int64_t);

Sgemm sgemm = nullptr;

// C (m, n) = op(A) op(B) over k; A and B are transposed where they say so.
struct Product {
  bool is_a_turned, is_b_turned;
  int64_t m, n, k;

  int Run(const float *a, const float *b, float *c) const {
    constexpr int64_t kLeast = 96;  // rows or columns that are worth packing the other matrix again
    const int64_t a_row = is_a_turned ? m : k, b_row = is_b_turned ? k : n;
    const char a_kind = is_a_turned ? 'T' : 'N', b_kind = is_b_turned ? 'T' : 'N';
    const bool cuts_rows = m >= n;
    std::atomic<int> failed{0};
    ThreadPool::Get().For(cuts_rows ? m : n, kLeast, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      const int status =
          cuts_rows ? sgemm(a_kind, b_kind, count, n, k, 1.0f, a + begin * (is_a_turned ? 1 : k), a_row, b, b_row, 0.0f,
                            c + begin * n, n)
                    : sgemm(a_kind, b_kind, m, count, k, 1.0f, a, a_row, b + begin * (is_b_turned ? k : 1), b_row, 0.0f,
                            c + begin, n);
      if (status != 0) failed.store(status);
    });
    return failed.load();
  }
};

const float *In(void *data) { return static_cast<const float *>(data); }
float *Out(void *data) { return static_cast<float *>(data); }

int64_t Rows(int dimensions, const int64_t *shape) {
  int64_t count = 1;
  for (int i = 0; i + 1 < dimensions; ++i) count *= shape[i];
  return count;
}

}  // namespace

// Before the first product.
extern "C" void Llama31SetSgemm(void *function) { sgemm = reinterpret_cast<Sgemm>(function); }

// x (..., K), weight (N, K) -> x weight^T (..., N).
extern "C" int Llama31TrainLinear(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *,
                                  void *) {
  if (nparam != 3 || sgemm == nullptr) return 1;
  return Product{false, true, Rows(ndims[0], shapes[0]), shapes[1][0], shapes[1][1]}.Run(In(params[0]), In(params[1]),
                                                                                         Out(params[2]));
}

// Gradient of the result (..., N), weight (N, K) -> that of x (..., K).
extern "C" int Llama31TrainLinearInputGrad(int nparam, void **params, int *ndims, int64_t **shapes, const char **,
                                           void *, void *) {
  if (nparam != 3 || sgemm == nullptr) return 1;
  return Product{false, false, Rows(ndims[0], shapes[0]), shapes[1][1], shapes[1][0]}.Run(In(params[0]), In(params[1]),
                                                                                          Out(params[2]));
}

// Gradient of the result (..., N), x (..., K) -> that of the weight (N, K).
extern "C" int Llama31TrainLinearWeightGrad(int nparam, void **params, int *ndims, int64_t **shapes, const char **,
                                            void *, void *) {
  if (nparam != 3 || sgemm == nullptr) return 1;
  const int64_t n = shapes[0][ndims[0] - 1], k = shapes[1][ndims[1] - 1];
  return Product{true, false, n, k, Rows(ndims[0], shapes[0])}.Run(In(params[0]), In(params[1]), Out(params[2]));
}
