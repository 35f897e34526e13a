// Attention of the queries of one sequence over its keys and values, read where the paged cache has them, in float32 or
// bfloat16; computed in float32.
//
// Scores and weighted sums are added up in an order that depends on the positions alone, so that a prompt computed in
// one go, in chunks or token by token gives the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "matmul.h"
#include "rows.h"

namespace llama31 {

// The keys and values of one sequence and one key-value head: token s has its D numbers at offsets[s].
template <typename T>
struct Sequence {
  const T *keys, *values;
  const int64_t *offsets;
  int64_t width;
};

// Where the first `length` tokens of a sequence are in the cache, for its first key-value head.
inline void FindTokens(const int32_t *table, int64_t length, int64_t block_size, int64_t slot_width, int64_t *offsets) {
  for (int64_t s = 0; s < length; ++table) {
    const int64_t end = std::min(length, s + block_size);
    for (int64_t offset = *table * block_size * slot_width; s < end; ++s, offset += slot_width) offsets[s] = offset;
  }
}

// Queries of one sequence that share a key-value head. Query i sees the first lengths[i] tokens.
struct Queries {
  std::vector<const float *> from;  // D floats each
  std::vector<float *> to;
  std::vector<int64_t> lengths;
  int64_t longest = 0;

  void Clear() { from.clear(), to.clear(), lengths.clear(), longest = 0; }

  void Add(const float *query, float *mixed, int64_t length) {
    from.push_back(query), to.push_back(mixed), lengths.push_back(length);
    longest = std::max(longest, length);
  }
};

// Products of MR queries of `width` floats that follow each other with four keys, of which load takes some lanes from
// memory; a query's are `stride` apart.
template <int MR, typename T, typename LoadVector>
ALWAYS_INLINE void ScoreColumns(const float *queries, const T *const *keys, int64_t width, float *scores,
                                int64_t stride, const LoadVector &load) {
  Vector sums[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sums[i][j] = Zero();
  for (int64_t at = 0; at < width; at += kLanes) {
    Vector q[MR];
    for (int i = 0; i < MR; ++i) q[i] = load(queries + i * width + at, width - at);
    for (int j = 0; j < 4; ++j) {
      const Vector key = load(keys[j] + at, width - at);
      for (int i = 0; i < MR; ++i) sums[i][j] = MultiplyAdd(q[i], key, sums[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    _mm_storeu_ps(scores + i * stride, SumEach(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
  }
}

// Any number of queries up to MR.
template <int MR, typename T>
ALWAYS_INLINE void ScoreKeys(int64_t rows, const float *queries, const T *const *keys, int64_t width, float *scores,
                             int64_t stride) {
  if constexpr (MR > 1) {
    if (rows < MR) return ScoreKeys<MR - 1>(rows, queries, keys, width, scores, stride);
  }
  if (width % kLanes == 0) {
    ScoreColumns<MR>(queries, keys, width, scores, stride, [](const auto *p, int64_t) { return LoadWide(p); });
  } else {
    ScoreColumns<MR>(queries, keys, width, scores, stride, [](const auto *p, int64_t n) { return LoadWide(p, n); });
  }
}

// Queries and vectors of values that are added up together.
constexpr int kMixedRows = 6, kMixedVectors = kLanes == 16 ? 4 : 2;

// Weighted sum of values for MR queries over kMixedVectors vectors of columns, which load and store take from memory:
// terms are added in the order of the positions.
template <int MR, typename T, typename LoadVector, typename StoreVector>
ALWAYS_INLINE void MixColumns(const Sequence<T> &sequence, const float *weights, int64_t stride, int64_t length,
                              int64_t column, float *const *out, const LoadVector &load, const StoreVector &store) {
  Vector sums[MR][kMixedVectors];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < kMixedVectors; ++j) sums[i][j] = Zero();
  for (int64_t s = 0; s < length; ++s) {
    const T *value = sequence.values + sequence.offsets[s] + column;
    Vector v[kMixedVectors];
    for (int j = 0; j < kMixedVectors; ++j) v[j] = load(value + kLanes * j, j);
    for (int i = 0; i < MR; ++i) {
      const Vector weight = Fill(weights[i * stride + s]);
      for (int j = 0; j < kMixedVectors; ++j) sums[i][j] = MultiplyAdd(weight, v[j], sums[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < kMixedVectors; ++j) store(out[i] + column + kLanes * j, j, sums[i][j]);
}

// Any number of queries up to MR.
template <int MR, typename T>
void MixValues(int64_t rows, const Sequence<T> &sequence, const float *weights, int64_t stride, int64_t length,
               int64_t column, float *const *out) {
  if constexpr (MR > 1) {
    if (rows < MR) return MixValues<MR - 1>(rows, sequence, weights, stride, length, column, out);
  }
  const int64_t left = sequence.width - column;
  if (left >= kMixedVectors * kLanes) {
    MixColumns<MR>(sequence, weights, stride, length, column, out, [](const T *p, int) { return LoadWide(p); },
                   [](float *p, int, Vector v) { Store(p, v); });
  } else {
    const auto count = [=](int j) { return std::max<int64_t>(0, left - kLanes * j); };
    MixColumns<MR>(sequence, weights, stride, length, column, out,
                   [&](const T *p, int j) { return LoadWide(p, count(j)); },
                   [&](float *p, int j, Vector v) { Store(p, FirstLanes(count(j)), v); });
  }
}

// Scores to weights that sum to 1 over the first `length`; zero from there to `stride`.
inline void Softmax(float *row, int64_t length, int64_t stride) {
  Vector most = Fill(-INFINITY);
  for (int64_t s = 0; s < length; s += kLanes) {
    const Mask mask = FirstLanes(length - s);
    most = Select(mask, Max(most, Load(row + s, mask)), most);
  }
  const Vector largest = Fill(MaxOf(most));
  Vector total = Zero();
  for (int64_t s = 0; s < length; s += kLanes) {
    const Mask mask = FirstLanes(length - s);
    const Vector e = Exp(Load(row + s, mask) - largest);
    Store(row + s, mask, e);
    total = Select(mask, total + e, total);
  }
  const Vector inverse = Fill(1.0f / SumOf(total));
  for (int64_t s = 0; s < length; s += kLanes) {
    const Mask mask = FirstLanes(length - s);
    Store(row + s, mask, Load(row + s, mask) * inverse);
  }
  std::fill(row + length, row + stride, 0.0f);
}

// Tokens whose keys are asked for before they are needed: twice as many of half the size.
template <typename T>
constexpr int64_t kAhead = 64 / sizeof(T);

template <typename T>
void Attend(const Queries &queries, const Sequence<T> &sequence) {
  static thread_local std::vector<float> scores_buffer, query_buffer;
  const int64_t count = static_cast<int64_t>(queries.from.size()), width = sequence.width;
  const int64_t length = queries.longest, stride = (length + 3) / 4 * 4;
  float *scores = Scratch(scores_buffer, count * stride), *q = Scratch(query_buffer, count * width);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) q[i * width + d] = queries.from[i][d] * scale;
  }
  for (int64_t s = 0; s < length; s += 4) {
    const T *keys[4];
    for (int j = 0; j < 4; ++j) {
      keys[j] = sequence.keys + sequence.offsets[std::min(s + j, length - 1)];
      // A head's keys and values do not follow each other: the processor does not foresee them.
      FetchLines(sequence.keys + sequence.offsets[std::min(s + j + kAhead<T>, length - 1)], width * sizeof(T));
      FetchLines(sequence.values + sequence.offsets[std::min(s + j, length - 1)], width * sizeof(T));
    }
    for (int64_t i = 0; i < count; i += kTileRows) {
      ScoreKeys<kTileRows>(count - i, q + i * width, keys, width, scores + i * stride + s, stride);
    }
  }
  for (int64_t i = 0; i < count; ++i) Softmax(scores + i * stride, queries.lengths[i], stride);
  for (int64_t i = 0; i < count; i += kMixedRows) {
    const int64_t rows = std::min<int64_t>(kMixedRows, count - i);
    const int64_t seen = *std::max_element(queries.lengths.begin() + i, queries.lengths.begin() + i + rows);
    for (int64_t column = 0; column < width; column += kMixedVectors * kLanes) {
      MixValues<kMixedRows>(rows, sequence, scores + i * stride, stride, seen, column, queries.to.data() + i);
    }
  }
}

}  // namespace llama31
