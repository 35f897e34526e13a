// y = x W^T for weights as checkpoints hold them, (N, K) row by row, in bfloat16 or float32.
//
// Every output is one dot product whose terms are added in an order that depends on K alone: a row's result is the
// same bits whatever else is in the batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "numbers.h"
#include "rows.h"
#include "thread_pool.h"
#include "vectors.h"

namespace llama31 {

// Of a group of quantised columns: weight = (q + zero) * scale. In 32 bits, as every weight of a few bits has a share.
struct Range {
  Bf16 short_scale;
  int16_t zero;  // in 128ths

  float scale() const { return short_scale.wide(); }
  float bias() const { return static_cast<float>(zero) * (scale() * 0.0078125f); }
};

// A weight as the model is given it; ranges, (N, G), are null where it is not quantised.
struct Stored {
  const void *data;
  const Range *ranges;
};

// What a tile goes through of the columns: all of them, or one of the parts that K is cut into. Meanwhile it asks for
// rows of the weight that come later: at each step for so many numbers of four rows, as they lie, from one of them on.
struct Columns {
  int64_t begin, end;
  bool is_first, is_last;
  int64_t fetch_share = 0, fetch_from = 0;
};

// Asks for memory line by line. Four rows that follow each other are read side by side, which a processor does not
// foresee as it does one stream. GCC takes a function that only asks for memory for one without effect and leaves calls of
// it out, so this and what only calls it must become part of its caller.
ALWAYS_INLINE void FetchLines(const void *from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(static_cast<const char *>(from) + at, _MM_HINT_T0);
}

// Rows of x, k numbers each, wherever they are.
template <typename T>
struct PlainView {
  const T *data;
  int64_t k;

  const T *row(int64_t m) const { return data + m * k; }
};

// Rows of x that are written one by one, as the product takes them.
template <typename T>
class PlainInputs {
 public:
  void Reset(int64_t rows, int64_t k, int64_t) { data_ = ScratchLines(buffer_, rows * k), k_ = k; }
  void Put(int64_t m, const float *x) { Convert(x, data_ + m * k_, k_); }
  PlainView<T> view() const { return {data_, k_}; }

 private:
  std::vector<T> buffer_;
  T *data_ = nullptr;
  int64_t k_ = 0;
};

// Four rows of a weight as they are, wherever they lie. How `Tile` sees rows: columns come in groups of a span, for each
// of which it keeps what Begin gives.
template <typename T>
struct PlainRows {
  struct Group {};

  const T *data[4];

  int64_t span(const Columns &columns) const { return columns.end - columns.begin; }
  int64_t first_group(const Columns &) const { return 0; }
  Group Begin(int, int64_t) const { return {}; }
  auto Load(int j, int64_t at, Group) const { return Lanes<T>::Load(data[j] + at); }
  auto Load(int j, int64_t at, int count) const { return Lanes<T>::Load(data[j] + at, count); }
  // What the steps of a tile ask for, in the order it lies in: the next four rows of k columns, or those after them,
  // where the last of the next ones would be needed at once. From a number on; how many bytes numbers have.
  const void *FetchFrom(int64_t k, int64_t from, bool is_next) const { return data[0] + (is_next ? 4 : 8) * k + from; }
  static int64_t FetchBytes(int64_t count) { return count * static_cast<int64_t>(sizeof(T)); }
};

// Rows that were written out and lie in the cache.
template <typename T>
struct WidenedRows : PlainRows<T> {
  static int64_t FetchBytes(int64_t) { return 0; }
};

constexpr int kTileRows = kLanes == 16 ? 6 : 3;  // of x: sums of as many rows times four stay in registers

// use(i) for i from 0 on, as constants: an array that is only indexed with such is kept in registers, whether the compiler
// makes a function of the code around it or not.
template <int... kIndexes, typename Use>
ALWAYS_INLINE void ForConstants(std::integer_sequence<int, kIndexes...>, const Use &use) {
  (use(std::integral_constant<int, kIndexes>()), ...);
}
template <int kCount, typename Use>
ALWAYS_INLINE void ForConstants(const Use &use) {
  ForConstants(std::make_integer_sequence<int, kCount>(), use);
}

// The lanes' sums of MR rows of x times four: zeros, or those that the part before left in `carried`, (MR, 4).
template <int MR>
ALWAYS_INLINE void Start(const Columns &columns, const float *carried, Vector (&sums)[MR][4]) {
  ForConstants<MR>([&](auto i) INLINED {
    ForConstants<4>([&](auto j) INLINED {
      sums[i][j] = columns.is_first ? Zero() : Load(carried + (i * 4 + j) * kLanes);
    });
  });
}

// After the last part the lanes are added up, to `out`; before it their sums are left in `carried`.
template <int MR>
ALWAYS_INLINE void Finish(const Vector (&sums)[MR][4], const Columns &columns, float *carried, __m128 *out) {
  ForConstants<MR>([&](auto i) INLINED {
    if (columns.is_last) {
      out[i] = SumEach(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    } else {
      ForConstants<4>([&](auto j) INLINED { Store(carried + (i * 4 + j) * kLanes, sums[i][j]); });
    }
  });
}

// MR rows of x, from `m` on, times four rows.
template <int MR, typename T, typename Rows>
inline void Tile(const PlainView<T> &x, int64_t m, const Rows &rows, const Columns &columns, float *carried,
                 __m128 *out) {
  using L = Lanes<T>;
  Vector sums[MR][4];
  Start(columns, carried, sums);
  const T *first = x.row(m);
  const auto add = [&](int64_t at, const auto &load_row, const auto &load_x) INLINED {
    decltype(load_x(first)) xs[MR];
    ForConstants<MR>([&](auto i) INLINED { xs[i] = load_x(first + i * x.k + at); });
    ForConstants<4>([&](auto j) INLINED {
      const auto w = load_row(j);
      ForConstants<MR>([&](auto i) INLINED { sums[i][j] = L::Accumulate(sums[i][j], xs[i], w); });
    });
  };
  constexpr int64_t kAll = 4 * L::kStep;
  const bool fetches_all = MR <= 2 && columns.fetch_share == kAll;  // the only tile, and a low one
  const int64_t span = rows.span(columns), fetch_bytes = rows.FetchBytes(columns.fetch_share);
  auto *fetched = static_cast<const char *>(rows.FetchFrom(x.k, columns.fetch_from, fetches_all));
  int64_t at = columns.begin;
  for (int64_t group = rows.first_group(columns); at + L::kStep <= columns.end; ++group) {
    typename Rows::Group groups[4];
    ForConstants<4>([&](auto j) INLINED { groups[j] = rows.Begin(j, group); });
    const int64_t end = std::min(columns.end, at + span);  // a part of the columns begins with a group
    for (; at + L::kStep <= end; at += L::kStep) {
      if (fetches_all) {
        FetchLines(fetched, rows.FetchBytes(kAll)), fetched += rows.FetchBytes(kAll);  // a known length is faster
      } else {
        FetchLines(fetched, fetch_bytes), fetched += fetch_bytes;
      }
      add(at, [&](auto j) INLINED { return rows.Load(j, at, groups[j]); }, [](auto *p) INLINED { return L::Load(p); });
    }
  }
  if (at < columns.end) {
    const int rest = static_cast<int>(columns.end - at);
    add(at, [&](auto j) INLINED { return rows.Load(j, at, rest); }, [&](auto *p) INLINED { return L::Load(p, rest); });
  }
  Finish(sums, columns, carried, out);
}

// Any number of rows of x up to MR.
template <int MR, typename View, typename Rows>
inline void TileOf(int64_t count, const View &x, int64_t m, const Rows &rows, const Columns &columns, float *carried,
                   __m128 *out) {
  if constexpr (MR > 1) {
    if (count < MR) return TileOf<MR - 1>(count, x, m, rows, columns, carried, out);
  }
  Tile<MR>(x, m, rows, columns, carried, out);
}

constexpr int64_t kPartBytes = 3 * 1024;     // of a row: four of the weight and those of a tile stay in the first-level cache
constexpr int64_t kPanelBytes = 256 * 1024;  // of x: stay in the second-level cache

// A matrix (N, K) as checkpoints hold it.
template <typename T>
class PlainMatrix {
 public:
  using Element = Factor<T>;
  using Inputs = PlainInputs<Element>;
  static constexpr int kRows = kTileRows;  // of x in a tile
  static constexpr int kStep = Lanes<Element>::kStep;  // of K
  static constexpr int kFetching = 4;  // tiles that rows to come are asked for in, for memory to have work all the time

  PlainMatrix(const Stored &stored, int64_t k, int64_t) : data_(static_cast<const T *>(stored.data)), k_(k) {}

  int64_t k() const { return k_; }
  int64_t part_unit() const { return kStep; }  // parts of K are multiples of it

  // use(rows) with the four rows from n on; beyond the last one, the last one again: computed and not stored.
  template <typename Use>
  void WithRows(int64_t n, int64_t n_end, const Columns &columns, bool is_used_often, const Use &use) const {
    PlainRows<T> rows{};
    for (int j = 0; j < 4; ++j) rows.data[j] = data_ + std::min<int64_t>(n + j, n_end - 1) * k_;
    if constexpr (!std::is_same_v<T, Element>) {
      if (is_used_often) return WithWidened(rows, columns, use);
    }
    use(rows);
  }

  // One row as float32.
  void Row(int64_t n, float *to) const { Widen(data_ + n * k_, to, k_); }

 private:
  template <typename Use>
  void WithWidened(const PlainRows<T> &rows, const Columns &columns, const Use &use) const {
    static thread_local std::vector<Element> buffer;
    Element *to = Scratch(buffer, 4 * k_);
    WidenedRows<Element> widened{};
    for (int j = 0; j < 4; ++j, to += k_) {
      FetchLines(rows.data[j] + 4 * k_ + columns.begin, (columns.end - columns.begin) * sizeof(T));
      Widen(rows.data[j] + columns.begin, to + columns.begin, columns.end - columns.begin);
      widened.data[j] = to;
    }
    use(widened);
  }

  const T *data_;
  int64_t k_;
};

// Rows [n_begin, n_end) of W against all M rows of x; store(m, n, four values, mask of those that exist).
//
// Many rows of x go through a weight in panels, and K in parts, so that what is used again is in a cache.
template <typename Matrix, typename Store>
void MatmulRows(const typename Matrix::Inputs &inputs, const Matrix &w, int64_t m_rows, int64_t n_begin, int64_t n_end,
                const Store &store) {
  constexpr int kRows = Matrix::kRows;
  constexpr int64_t kBlock = 32;  // rows of W of which sums are carried from part to part
  const auto x = inputs.view();
  const int64_t k = w.k();
  // Parts of nearly one size, none above `most` by more than a unit.
  const auto cut = [](int64_t count, int64_t most, int64_t unit) {
    const int64_t parts = (count + most - 1) / most, size = (count + parts - 1) / parts;
    return (size + unit - 1) / unit * unit;
  };
  const bool is_used_often = m_rows > 2 * kRows;
  constexpr int64_t kBytes = sizeof(typename Matrix::Element);
  const bool is_cut = m_rows * k * kBytes > kPanelBytes && k * kBytes > kPartBytes;
  const int64_t part = is_cut ? cut(k, kPartBytes / kBytes, w.part_unit()) : k;
  const int64_t panel_most = std::max<int64_t>(kRows, kPanelBytes / (part * kBytes));
  const int64_t panel = cut(m_rows, panel_most, kRows);
  static thread_local std::vector<float> buffer;
  float *sums = Scratch(buffer, part < k ? kBlock * panel * kLanes : 0);
  for (int64_t m_begin = 0; m_begin < m_rows; m_begin += panel) {
    const int64_t m_end = std::min(m_rows, m_begin + panel);
    const int64_t block = part < k ? kBlock : n_end - n_begin;
    for (int64_t block_begin = n_begin; block_begin < n_end; block_begin += block) {
      const int64_t block_end = std::min(n_end, block_begin + block);
      for (int64_t begin = 0; begin < k; begin += part) {
        Columns columns{begin, std::min(k, begin + part), begin == 0, begin + part >= k};
        for (int64_t n = block_begin; n < block_end; n += 4) {
          const FourMask kept = FirstOfFour(n_end - n);
          w.WithRows(n, n_end, columns, is_used_often, [&](const auto &rows) {
            int64_t tiles = (m_end - m_begin + kRows - 1) / kRows;
            int64_t fetching = part == k ? std::min<int64_t>(tiles, Matrix::kFetching) : 0;
            columns.fetch_from = 0, columns.fetch_share = fetching ? (4 * Matrix::kStep + fetching - 1) / fetching : 0;
            for (int64_t m = m_begin, count; m < m_end; m += count, --tiles) {
              count = (m_end - m + tiles - 1) / tiles;  // all tiles are nearly as high
              float *carried = sums + ((n - block_begin) * panel + (m - m_begin) * 4) * kLanes;
              __m128 out[kRows];
              TileOf<kRows>(count, x, m, rows, columns, carried, out);
              if (--fetching > 0) {
                columns.fetch_from += k / Matrix::kStep * columns.fetch_share;
              } else {
                columns.fetch_share = 0;
              }
              if (!columns.is_last) continue;
              for (int64_t i = 0; i < count; ++i) store(m + i, n, out[i], kept);
            }
          });
        }
      }
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
