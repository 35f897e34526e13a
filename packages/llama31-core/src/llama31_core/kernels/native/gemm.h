// Products of small float32 matrices that stay in a core's cache: C = A B or C += A B.
#pragma once

#include <cstdint>

#include "vectors.h"

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
    for (int64_t column = 0; column < n; column += kMost * kLanes) ColumnsFrom<kMost>(column);
  }

 private:
  // Vectors of C side by side in registers, under six rows.
  static constexpr int kMost = kLanes == 16 ? 4 : 2;

  template <int kVectors>
  void ColumnsFrom(int64_t column) const {
    if constexpr (kVectors > 1) {
      if (n - column < kVectors * kLanes) return ColumnsFrom<kVectors - 1>(column);
    }
    Columns<kVectors>(column);
  }

  template <int kVectors>
  void Columns(int64_t column) const {
    int64_t row = 0;
    for (; row + 6 <= m; row += 6) Tile<6, kVectors>(row, column);
    for (; row + 2 <= m; row += 2) Tile<2, kVectors>(row, column);
    if (row < m) Tile<1, kVectors>(row, column);
  }

  // kRows x (kLanes kVectors) numbers of C are kept in registers over the whole of k.
  template <int kRows, int kVectors>
  void Tile(int64_t row, int64_t column) const {
    Vector sums[kRows][kVectors];
    float *to = c + row * c_row + column;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = adds ? Load(to + r * c_row + kLanes * v) : Zero();
      }
    }
    const float *left = a + row * a_row, *right = b + column;
    for (int64_t i = 0; i < k; ++i, left += a_column, right += b_row) {
      Vector values[kVectors];
      for (int v = 0; v < kVectors; ++v) values[v] = Load(right + kLanes * v);
      for (int r = 0; r < kRows; ++r) {
        const Vector factor = Fill(left[r * a_row]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = MultiplyAdd(factor, values[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) Store(to + r * c_row + kLanes * v, sums[r][v]);
    }
  }
};

}  // namespace llama31
