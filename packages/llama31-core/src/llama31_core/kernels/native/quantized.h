// Rows of weights of 8 or 4 bits, groups of columns with a scale and a bias each: weight = q * scale + bias.
//
// Where bfloat16 is multiplied, weights are rounded to it on the way into the product, so that it gives the bits which a
// checkpoint of the same weights in bfloat16 gives, whether a row is widened in registers or written out first. Else
// whole numbers are multiplied (quantized_integers.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matmul.h"
#include "numbers.h"
#include "rows.h"
#include "stored_rows.h"

#ifndef __AVX512BF16__
#include "quantized_integers.h"
#else

namespace llama31 {

constexpr int64_t kSteps = Lanes<Bf16>::kStep;  // columns that one load widens; groups are multiples of it

// A range in all lanes.
struct FilledRange {
  explicit FilledRange(const Range &range) {
    int32_t stored;
    std::memcpy(&stored, &range, sizeof stored);
    const __m512i lanes = _mm512_set1_epi32(stored);
    scale = _mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16));
    zero = _mm512_cvtepi32_ps(_mm512_srai_epi32(lanes, 16)) * Fill(0.0078125f);
  }

  Vector scale, zero;
};

// 8 bits: (N, K) of int8.
struct Bits8 {
  static constexpr int64_t kPerByte = 1;
  struct Group {
    Vector scale, bias;
  };

  static Group Begin(const FilledRange &range) { return {range.scale, range.zero * range.scale}; }

  static __m512i Load(const uint8_t *p, const Group &group) {
    const __m512 low = Widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)), group);
    const __m512 high = Widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 16)), group);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

 private:
  static __m512 Widen(__m128i q, const Group &group) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), group.scale, group.bias);
  }
};

// 4 bits: (N, K / 2) of bytes, the even column in the low half. Each group has its sixteen weights as a table, twice.
struct Bits4 {
  static constexpr int64_t kPerByte = 2;
  struct Group {
    __m512i table;
  };

  static Group Begin(const FilledRange &range) {
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 weights = (steps + range.zero) * range.scale;
    return {(__m512i)_mm512_cvtne2ps_pbh(weights, weights)};
  }

  // Four columns go into four words, each shifted until its number is lowest. Of a word a table of 32 regards five bits,
  // of which the fifth makes no difference.
  static __m512i Load(const uint8_t *p, const Group &group) {
    const __m512i fours = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m512i shifts = _mm512_set1_epi64(0x000c'0008'0004'0000);
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, fours), group.table);
  }
};

// Four rows, for `Tile`.
template <typename Bits>
struct QuantizedRows : StoredRows<Bits> {
  using Group = typename Bits::Group;

  int64_t span(const Columns &) const { return this->group_size; }
  int64_t first_group(const Columns &columns) const { return columns.is_first ? 0 : columns.begin / this->group_size; }
  Group Begin(int j, int64_t group) const { return Bits::Begin(FilledRange(this->ranges[j][group])); }
  auto Load(int j, int64_t at, const Group &group) const {
    return Bits::Load(this->data[j] + at / Bits::kPerByte, group);
  }
  auto Load(int j, int64_t at, int) const { return Load(j, at, Begin(j, at / this->group_size)); }  // K has no rest
};

// A matrix (N, K); `rows` at a time are widened once and kept where many rows of x go through them.
template <typename Bits>
class QuantizedMatrix : public StoredMatrix<Bits> {
 public:
  using Element = Bf16;
  using Inputs = PlainInputs<Bf16>;
  static constexpr int kRows = kTileRows, kStep = Lanes<Bf16>::kStep, kFetching = 1;

  using StoredMatrix<Bits>::StoredMatrix;

  // use(rows) with the four rows from n on; beyond the last one, the last one again.
  template <typename Use>
  void WithRows(int64_t n, int64_t n_end, const Columns &columns, bool is_used_often, const Use &use) const {
    const QuantizedRows<Bits> rows{this->RowsAt(n, n_end)};
    if (!is_used_often) return use(rows);
    static thread_local std::vector<Bf16> buffer;
    Bf16 *to = Scratch(buffer, 4 * this->k_);
    WidenedRows<Bf16> widened{};
    rows.FetchNext(this->k_, columns.begin, columns.end);
    for (int j = 0; j < 4; ++j, to += this->k_) {
      Expand(rows, j, columns.begin, columns.end, to);
      widened.data[j] = to;
    }
    use(widened);
  }

  // One row as float32.
  void Row(int64_t n, float *to) const {
    static thread_local std::vector<Bf16> buffer;
    Bf16 *row = Scratch(buffer, this->k_);
    Expand({this->RowsAt(n, n + 1)}, 0, 0, this->k_, row);
    Widen(row, to, this->k_);
  }

 private:
  // Columns [begin, end), of which the first begins a group.
  void Expand(const QuantizedRows<Bits> &rows, int j, int64_t begin, int64_t end, Bf16 *to) const {
    for (int64_t at = begin; at < end;) {
      const auto group = rows.Begin(j, at / this->group_size_);
      for (const int64_t last = std::min(end, at + this->group_size_); at < last; at += kSteps) {
        _mm512_storeu_si512(to + at, rows.Load(j, at, group));
      }
    }
  }
};

}  // namespace llama31

#endif
