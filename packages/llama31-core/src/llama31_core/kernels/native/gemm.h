// Products of small float32 matrices that stay in a core's cache: C = A B or C += A B.
#pragma once

#include <cstdint>

#include <immintrin.h>

namespace llama31 {

// A (m, k) with any strides; B (k, n) and C (m, n) with rows of contiguous numbers; n is a multiple of 16.
struct Gemm {
  const float *a;
  int64_t a_row, a_column;
  const float *b;
  int64_t b_row;
  float *c;
  int64_t c_row;
  int64_t m, n, k;
  bool adds;

  void Run() const {
    for (int64_t column = 0; column < n; column += 64) {
      switch ((n - column) / 16) {
        case 1: Columns<1>(column); break;
        case 2: Columns<2>(column); break;
        case 3: Columns<3>(column); break;
        default: Columns<4>(column);
      }
    }
  }

 private:
  template <int kVectors>
  void Columns(int64_t column) const {
    int64_t row = 0;
    for (; row + 6 <= m; row += 6) Tile<6, kVectors>(row, column);
    for (; row + 2 <= m; row += 2) Tile<2, kVectors>(row, column);
    if (row < m) Tile<1, kVectors>(row, column);
  }

  // kRows x (16 kVectors) numbers of C are kept in registers over the whole of k.
  template <int kRows, int kVectors>
  void Tile(int64_t row, int64_t column) const {
    __m512 sums[kRows][kVectors];
    float *to = c + row * c_row + column;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = adds ? _mm512_loadu_ps(to + r * c_row + 16 * v) : _mm512_setzero_ps();
      }
    }
    const float *left = a + row * a_row, *right = b + column;
    for (int64_t i = 0; i < k; ++i, left += a_column, right += b_row) {
      __m512 values[kVectors];
      for (int v = 0; v < kVectors; ++v) values[v] = _mm512_loadu_ps(right + 16 * v);
      for (int r = 0; r < kRows; ++r) {
        const __m512 factor = _mm512_set1_ps(left[r * a_row]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_fmadd_ps(factor, values[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(to + r * c_row + 16 * v, sums[r][v]);
    }
  }
};

}  // namespace llama31
