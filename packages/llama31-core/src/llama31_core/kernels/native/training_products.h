// Products with a weight in training, forward and backward, in float32.
//
// oneDNN multiplies, without threads of its own: parts of the result go to the pool, whose threads take the next part
// when they are done with one. MindSpore's own operator cuts a product into as many parts as there are threads, and the
// thread that started it spins until the slowest is done.
#pragma once

#include <atomic>
#include <cstdint>

#include "thread_pool.h"

namespace llama31 {

// C (m, n) = op(A) op(B) over k; A and B are transposed where they say so.
struct Product {
  // oneDNN's dnnl_sgemm, for matrices whose rows are contiguous: C = alpha op(A) op(B) + beta C.
  using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                        float, float *, int64_t);

  inline static Sgemm sgemm = nullptr;  // before the first product

  bool is_a_turned, is_b_turned;
  int64_t m, n, k;

  // oneDNN's status; 1 before it has been found.
  int Run(const float *a, const float *b, float *c) const {
    if (sgemm == nullptr) return 1;
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

}  // namespace llama31
