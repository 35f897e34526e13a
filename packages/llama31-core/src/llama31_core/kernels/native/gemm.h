// Products of small float32 matrices that stay in a core's cache: C = A B or C += A B.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace llama31 {

// A (m, k) with any strides; C (m, n) with rows of contiguous numbers; B (k, n) in panels of 16 columns, `b_panel` apart
// (16 where its rows are contiguous), with rows `b_row` apart; n is a multiple of 16.
struct Gemm {
  const float *a;
  int64_t a_row, a_column;
  const float *b;
  int64_t b_row, b_panel;
  float *c;
  int64_t c_row;
  int64_t m, n, k;
  bool adds;

  // Where B's rows are short they stay in the first-level cache: C is computed row after row, and K in parts, so that as
  // many of them do. Else B is read once, column after column.
  void Run() const {
    if (n > kShort) return Rows(0, m);
    for (int64_t begin = 0; begin < k; begin += kPart) {
      Gemm part = *this;
      part.a += begin * a_column, part.b += begin * b_row;
      part.k = std::min(kPart, k - begin), part.adds = adds || begin > 0;
      for (int64_t row = 0; row < m; row += 6) part.Rows(row, std::min(m, row + 6));
    }
  }

 private:
  // Vectors of C side by side in registers, under six rows.
  static constexpr int kMost = kLanes == 16 ? 4 : 2;
  static constexpr int64_t kShort = 128, kPart = 64;

  void Rows(int64_t begin, int64_t end) const {
    for (int64_t column = 0; column < n; column += kMost * kLanes) ColumnsFrom<kMost>(begin, end, column);
  }

  template <int kVectors>
  void ColumnsFrom(int64_t begin, int64_t end, int64_t column) const {
    if constexpr (kVectors > 1) {
      if (n - column < kVectors * kLanes) return ColumnsFrom<kVectors - 1>(begin, end, column);
    }
    Columns<kVectors>(begin, end, column);
  }

  template <int kVectors>
  void Columns(int64_t row, int64_t end, int64_t column) const {
    for (; row + 6 <= end; row += 6) Tile<6, kVectors>(row, column);
    for (; row + 2 <= end; row += 2) Tile<2, kVectors>(row, column);
    if (row < end) Tile<1, kVectors>(row, column);
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
    const float *left = a + row * a_row, *right = b + column / 16 * b_panel;
    const int64_t next = kLanes == 16 ? b_panel : kLanes;  // from vector to vector; `column` begins a panel
    for (int64_t i = 0; i < k; ++i, left += a_column, right += b_row) {
      Vector values[kVectors];
      for (int v = 0; v < kVectors; ++v) values[v] = Load(right + next * v);
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
