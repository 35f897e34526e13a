// y = x W^T for weights as checkpoints hold them, (N, K) row by row, in bfloat16 or float32.
//
// Every output is one dot product whose terms are added in an order that depends on K alone: a row's result is the
// same bits whatever else is in the batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "rows.h"
#include "thread_pool.h"
#include "vectors.h"

namespace llama31 {

// A weight as the operator is given it; scales and biases, (N, G), are null where it is not quantised.
struct Stored {
  const void *data;
  const float *scales, *biases;
};

// Four rows of a weight as they are, wherever they lie. How `Tile` sees rows: columns come in groups, for each of which
// it keeps what Begin gives.
template <typename T>
struct PlainRows {
  struct Group {};

  const T *data[4];

  int64_t group(int64_t k) const { return k; }
  Group Begin(int, int64_t) const { return {}; }
  auto Load(int j, int64_t at, Group) const { return Lanes<T>::Load(data[j] + at); }
  auto Load(int j, int64_t at, int count) const { return Lanes<T>::Load(data[j] + at, count); }
  void Fetch(int j, int64_t at, int64_t ahead) const {
    _mm_prefetch(reinterpret_cast<const char *>(data[j] + at + ahead), _MM_HINT_T0);
  }
};

// MR rows of x, `x_stride` apart, times four rows. What lies `ahead` columns behind those is fetched meanwhile; 0 for
// nothing.
template <int MR, typename T, typename Rows>
inline void Tile(const T *x, int64_t x_stride, const Rows &rows, int64_t k, int64_t ahead, __m128 *out) {
  using L = Lanes<T>;
  Vector sums[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sums[i][j] = Zero();
  // Sums stay in registers only where this is inlined, which GCC leaves to chance in large sources.
  const auto add = [&](int64_t at, const auto &load_row, const auto &load_x) __attribute__((always_inline)) {
    decltype(load_row(0)) ws[4];
    for (int j = 0; j < 4; ++j) ws[j] = load_row(j);
    for (int i = 0; i < MR; ++i) {
      const auto xi = load_x(x + i * x_stride + at);
      for (int j = 0; j < 4; ++j) sums[i][j] = L::Accumulate(sums[i][j], xi, ws[j]);
    }
  };
  int64_t at = 0;
  while (at + L::kStep <= k) {
    typename Rows::Group groups[4];
    for (int j = 0; j < 4; ++j) groups[j] = rows.Begin(j, at);
    const int64_t end = std::min(k, at + rows.group(k));
    for (; at + L::kStep <= end; at += L::kStep) {
      if (ahead > 0) {
        for (int j = 0; j < 4; ++j) rows.Fetch(j, at, ahead);
      }
      add(at, [&](int j) { return rows.Load(j, at, groups[j]); }, [](const T *p) { return L::Load(p); });
    }
  }
  if (at < k) {
    const int rest = static_cast<int>(k - at);
    add(at, [&](int j) { return rows.Load(j, at, rest); }, [&](const T *p) { return L::Load(p, rest); });
  }
  for (int i = 0; i < MR; ++i) out[i] = SumEach(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
}

constexpr int kTileRows = kLanes == 16 ? 6 : 3;  // of x: sums of as many rows times four stay in registers

// Any number of rows of x up to MR.
template <int MR = kTileRows, typename T, typename Rows>
inline void TileOf(int64_t m_rows, const T *x, int64_t x_stride, const Rows &rows, int64_t k, int64_t ahead,
                   __m128 *out) {
  if constexpr (MR > 1) {
    if (m_rows < MR) return TileOf<MR - 1>(m_rows, x, x_stride, rows, k, ahead, out);
  }
  Tile<MR>(x, x_stride, rows, k, ahead, out);
}

// A matrix (N, K) as checkpoints hold it.
template <typename T>
class PlainMatrix {
 public:
  using Input = Factor<T>;

  PlainMatrix(const Stored &stored, int64_t k, int64_t) : data_(static_cast<const T *>(stored.data)), k_(k) {}

  int64_t k() const { return k_; }

  // use(rows) with the four rows from n on; beyond the last one, the last one again: computed and not stored.
  template <typename Use>
  void WithRows(int64_t n, int64_t n_end, bool is_used_often, const Use &use) const {
    PlainRows<T> rows{};
    for (int j = 0; j < 4; ++j) rows.data[j] = data_ + std::min<int64_t>(n + j, n_end - 1) * k_;
    if constexpr (!std::is_same_v<T, Input>) {
      if (is_used_often) return WithWidened(rows, use);
    }
    use(rows);
  }

  // One row as float32.
  void Row(int64_t n, float *to) const { Widen(data_ + n * k_, to, k_); }

 private:
  template <typename Use>
  void WithWidened(const PlainRows<T> &rows, const Use &use) const {
    static thread_local std::vector<Input> buffer;
    Input *to = Scratch(buffer, 4 * k_);
    PlainRows<Input> widened{};
    for (int j = 0; j < 4; ++j, to += k_) {
      Widen(rows.data[j], to, k_);
      widened.data[j] = to;
    }
    use(widened);
  }

  const T *data_;
  int64_t k_;
};

// Rows [n_begin, n_end) of W against all M rows of x; store(m, n, four values, mask of those that exist).
template <typename Matrix, typename Store>
void MatmulRows(const typename Matrix::Input *x, const Matrix &w, int64_t m_rows, int64_t n_begin, int64_t n_end,
                const Store &store) {
  const int64_t k = w.k(), row_bytes = k * static_cast<int64_t>(sizeof(typename Matrix::Input));
  // So many rows of x at a time stay in the second-level cache.
  const int64_t panel = std::max<int64_t>(1, (256 * 1024) / (row_bytes * kTileRows)) * kTileRows;
  for (int64_t m_begin = 0; m_begin < m_rows; m_begin += panel) {
    const int64_t m_end = std::min(m_rows, m_begin + panel);
    for (int64_t n = n_begin; n < n_end; n += 4) {
      const FourMask kept = FirstOfFour(n_end - n);
      w.WithRows(n, n_end, m_end - m_begin > kTileRows, [&](const auto &rows) {
        for (int64_t m = m_begin; m < m_end; m += kTileRows) {
          const int64_t tile_rows = std::min<int64_t>(kTileRows, m_end - m);
          __m128 sums[kTileRows];
          const int64_t ahead = m == m_begin ? 4 * k : 0;  // the first tile waits for memory: it asks for the next rows
          TileOf(tile_rows, x + m * k, k, rows, k, ahead, sums);
          for (int64_t i = 0; i < tile_rows; ++i) store(m + i, n, sums[i], kept);
        }
      });
    }
  }
}

// Calls body(begin, end) for parts of the rows [0, n_rows) of W, in whole groups of the four that a tile takes.
template <typename Body>
void ForWeightRows(int64_t n_rows, const Body &body) {
  constexpr int64_t kGroups = 8;  // that are worth a thread
  ThreadPool::Get().For((n_rows + 3) / 4, kGroups,
                        [&](int64_t begin, int64_t end) { body(begin * 4, std::min(end * 4, n_rows)); });
}

}  // namespace llama31
