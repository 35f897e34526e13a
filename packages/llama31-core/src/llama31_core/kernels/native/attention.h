// Attention of the queries of one sequence over its keys and values, read where the paged cache has them.
//
// Scores and weighted sums are added up in an order that depends on the positions alone, so that a prompt computed in
// one go, in chunks or token by token gives the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <immintrin.h>

#include "matmul.h"
#include "rows.h"

namespace llama31 {

// The keys and values of one sequence and one key-value head: token s has its D floats at offsets[s].
struct Sequence {
  const float *keys, *values;
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

// Weighted sum of values for up to 4 queries over 64 columns: terms are added in the order of the positions.
template <int MR>
void MixValues(const Sequence &sequence, const float *weights, int64_t stride, int64_t length,
               int64_t column, float *const *out) {
  __m512 sums[MR][4];
  __mmask16 masks[4];
  for (int j = 0; j < 4; ++j) masks[j] = Mask(std::max<int64_t>(0, sequence.width - column - 16 * j));
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_ps();
  for (int64_t s = 0; s < length; ++s) {
    const float *value = sequence.values + sequence.offsets[s] + column;
    __m512 v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm512_maskz_loadu_ps(masks[j], value + 16 * j);
    for (int i = 0; i < MR; ++i) {
      const __m512 weight = _mm512_set1_ps(weights[i * stride + s]);
      for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_fmadd_ps(weight, v[j], sums[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) _mm512_mask_storeu_ps(out[i] + column + 16 * j, masks[j], sums[i][j]);
}

// Scores to weights that sum to 1 over the first `length`; zero from there to `stride`.
inline void Softmax(float *row, int64_t length, int64_t stride) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t s = 0; s < length; s += 16) {
    most = _mm512_mask_max_ps(most, Mask(length - s), most, _mm512_maskz_loadu_ps(Mask(length - s), row + s));
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  for (int64_t s = 0; s < length; s += 16) {
    const __mmask16 mask = Mask(length - s);
    const __m512 e = Exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + s), largest));
    _mm512_mask_storeu_ps(row + s, mask, e);
    total = _mm512_mask_add_ps(total, mask, total, e);
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t s = 0; s < length; s += 16) {
    const __mmask16 mask = Mask(length - s);
    _mm512_mask_storeu_ps(row + s, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + s), inverse));
  }
  std::fill(row + length, row + stride, 0.0f);
}

inline void Attend(const Queries &queries, const Sequence &sequence) {
  static thread_local std::vector<float> scores_buffer, query_buffer;
  const int64_t count = static_cast<int64_t>(queries.from.size()), width = sequence.width;
  const int64_t length = queries.longest, stride = (length + 3) / 4 * 4;
  float *scores = Scratch(scores_buffer, count * stride), *q = Scratch(query_buffer, count * width);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) q[i * width + d] = queries.from[i][d] * scale;
  }
  for (int64_t s = 0; s < length; s += 4) {
    PlainRows<float> keys{};
    for (int j = 0; j < 4; ++j) keys.data[j] = sequence.keys + sequence.offsets[std::min(s + j, length - 1)];
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, count - i);
      __m128 sums[kTileRows];
      TileOf(rows, q + i * width, width, keys, width, 0, sums);
      for (int64_t r = 0; r < rows; ++r) _mm_storeu_ps(scores + (i + r) * stride + s, sums[r]);
    }
  }
  for (int64_t i = 0; i < count; ++i) Softmax(scores + i * stride, queries.lengths[i], stride);
  for (int64_t i = 0; i < count; i += 4) {
    const float *weights = scores + i * stride;
    float *const *out = queries.to.data() + i;
    const int64_t rows = std::min<int64_t>(4, count - i);
    const int64_t seen = *std::max_element(queries.lengths.begin() + i, queries.lengths.begin() + i + rows);
    for (int64_t column = 0; column < width; column += 64) {
      switch (rows) {
        case 1: MixValues<1>(sequence, weights, stride, seen, column, out); break;
        case 2: MixValues<2>(sequence, weights, stride, seen, column, out); break;
        case 3: MixValues<3>(sequence, weights, stride, seen, column, out); break;
        default: MixValues<4>(sequence, weights, stride, seen, column, out);
      }
    }
  }
}

}  // namespace llama31
