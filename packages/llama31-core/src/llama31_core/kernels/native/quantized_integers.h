// Rows of weights of 8 or 4 bits where there is no product of bfloat16: whole numbers of 16 bits are multiplied.
//
// Rows of x are rounded to 16 bits of the largest number of each section of K, an error of 2^-16 of it, and sums within a
// section are exact: sum(w x) = sum over sections of scale s sum(q n) + bias s sum(n), where x = s n. Terms are added in
// an order that depends on K and the group's size alone, so that a row's result is the same bits whatever else is in the
// batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "matmul.h"
#include "rows.h"
#include "stored_rows.h"

namespace llama31 {

constexpr int64_t kStep16 = 32;  // columns that a step goes through, in two vectors of 16; groups are multiples of it

// A group, or the largest part of it that divides it and whose sums are sure to stay below 2^31: 8 lanes add up at most
// 1,024 / 8 products of 2^7 and 2^15.
inline int64_t SectionOf(int64_t group_size) {
  int64_t parts = 1;
  while (group_size / parts > 1024 || group_size % (parts * kStep16) != 0) ++parts;
  return group_size / parts;
}

struct Pair {
  __m256i first, second;
};

inline Pair LoadPair(const int16_t *p) {
  const auto *at = reinterpret_cast<const __m256i *>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}

inline void Store(int16_t *p, const Pair &pair) {
  auto *at = reinterpret_cast<__m256i *>(p);
  _mm256_storeu_si256(at, pair.first), _mm256_storeu_si256(at + 1, pair.second);
}

// Numbers of 32 bits, sixteen after sixteen, as numbers of 16.
inline __m256i Narrow(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
}

// 8 bits: (N, K) of int8; numbers of x in their order.
struct Bits8 {
  static constexpr int64_t kPerByte = 1;

  static int64_t NumberAt(const uint8_t *row, int64_t column) { return static_cast<int8_t>(row[column]); }
  static Pair Load(const uint8_t *p) {
    const auto *at = reinterpret_cast<const __m128i *>(p);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))};
  }
  static Pair Arrange(const Pair &numbers) { return numbers; }
};

// 4 bits: (N, K / 2) of bytes, the even column in the low half. Columns 4i of a step of 32 come first, then 4i + 1, then
// 4i + 2, then 4i + 3: masks and shifts take the numbers apart that way.
struct Bits4 {
  static constexpr int64_t kPerByte = 2;

  static int64_t NumberAt(const uint8_t *row, int64_t column) { return row[column / 2] >> (column % 2 * 4) & 0xf; }
  static Pair Load(const uint8_t *p) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m256i bits = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i mask = _mm256_set1_epi16(0xf);
    return {_mm256_and_si256(bits, mask), _mm256_and_si256(_mm256_srli_epi16(bits, 8), mask)};
  }
  static Pair Arrange(const Pair &numbers) {
    // Two fours of columns become four pairs; then these are a matrix of 4 x 4 that is transposed.
    const __m256i pairs = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,  //
                                           0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i a = _mm256_shuffle_epi8(numbers.first, pairs), b = _mm256_shuffle_epi8(numbers.second, pairs);
    const __m256i even = _mm256_permute2x128_si256(a, b, 0x20), odd = _mm256_permute2x128_si256(a, b, 0x31);
    return {_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(even, odd), 0b11011000),
            _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(even, odd), 0b11011000)};
  }
};

// Rows of x as whole numbers, with the s of each section and s sum(n) of each group.
struct IntegerView {
  const int16_t *numbers;
  const float *scales, *sums;
  int64_t k, section, sections, groups;
};

template <typename Bits>
class IntegerInputs {
 public:
  void Reset(int64_t rows, int64_t k, int64_t group_size) {
    k_ = k, group_size_ = group_size, section_ = SectionOf(group_size);
    sections_ = (k + section_ - 1) / section_, groups_ = (k + group_size - 1) / group_size;
    numbers_ = Scratch(numbers_buffer_, rows * k);
    scales_ = Scratch(scales_buffer_, rows * sections_), sums_ = Scratch(sums_buffer_, rows * groups_);
  }

  void Put(int64_t m, const float *x) {
    std::fill(sums_ + m * groups_, sums_ + (m + 1) * groups_, 0.0f);
    for (int64_t s = 0; s < sections_; ++s) {
      const int64_t begin = s * section_, end = std::min(k_, begin + section_);
      Vector most = Zero(), nothing = Zero();
      for (int64_t i = begin; i < end; i += kLanes) {
        const Vector values = Load(x + i);
        most = Max(most, Max(values, Zero() - values));
        nothing += values - values;
      }
      const float scale = MaxOf(most) / 32767.0f + SumOf(nothing);  // no number if one of x is none
      const float inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;
      __m256i sum = _mm256_setzero_si256();
      for (int64_t i = begin; i < end; i += kStep16) {
        __m256i whole[4];
        for (int v = 0; v < 4; ++v) {
          whole[v] = _mm256_cvtps_epi32(Load(x + i + v * kLanes) * Fill(inverse));
          sum = _mm256_add_epi32(sum, whole[v]);
        }
        Store(numbers_ + m * k_ + i, Bits::Arrange({Narrow(whole[0], whole[1]), Narrow(whole[2], whole[3])}));
      }
      scales_[m * sections_ + s] = scale;
      sums_[m * groups_ + begin / group_size_] += scale * SumOf(_mm256_cvtepi32_ps(sum));
    }
  }

  IntegerView view() const { return {numbers_, scales_, sums_, k_, section_, sections_, groups_}; }

 private:
  std::vector<int16_t> numbers_buffer_;
  std::vector<float> scales_buffer_, sums_buffer_;
  int16_t *numbers_ = nullptr;
  float *scales_ = nullptr, *sums_ = nullptr;
  int64_t k_ = 0, group_size_ = 0, section_ = 0, sections_ = 0, groups_ = 0;
};

// Four rows, for `Tile`.
template <typename Bits>
struct QuantizedRows : StoredRows<Bits> {
  Pair Load(int j, int64_t at) const { return Bits::Load(this->data[j] + at / Bits::kPerByte); }
};

// The same as numbers of 16 bits, in the order of x.
template <typename Bits>
struct WidenedNumbers : QuantizedRows<Bits> {
  const int16_t *numbers[4];

  Pair Load(int j, int64_t at) const { return LoadPair(numbers[j] + at); }
  ALWAYS_INLINE void FetchNext(int64_t, int64_t, int64_t) const {}
};

// The sums of products of columns [begin, end) of MR rows of x, k numbers each, with four rows. A function by itself, so
// that sums stay in registers; the product is assembly, because GCC knows that whole numbers may be added in any order,
// adds products first and runs out of registers.
template <int MR, typename Rows>
__attribute__((noinline)) void SumProducts(const int16_t *x, int64_t k, const Rows &rows, int64_t begin, int64_t end,
                                           bool fetches, __m256i (&sums)[MR][4]) {
  __m256i whole[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) whole[i][j] = _mm256_setzero_si256();
  const auto add = [](__m256i &sum, __m256i a, __m256i b) __attribute__((always_inline)) {
    __m256i product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  };
  for (int64_t at = begin; at < end; at += kStep16) {
    if (fetches) rows.FetchNext(k, at, at + kStep16);
    Pair numbers[MR];
    for (int i = 0; i < MR; ++i) {
      numbers[i] = LoadPair(x + i * k + at);
      asm("" : "+x"(numbers[i].first), "+x"(numbers[i].second));  // not loaded again for each product
    }
    for (int j = 0; j < 4; ++j) {
      const Pair w = rows.Load(j, at);
      for (int i = 0; i < MR; ++i) add(whole[i][j], w.first, numbers[i].first);
      for (int i = 0; i < MR; ++i) add(whole[i][j], w.second, numbers[i].second);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sums[i][j] = whole[i][j];
}

// The biases of as many ranges as there are lanes.
inline Vector Biases(const Range *ranges, Mask mask) {
  const __m256i stored = _mm256_maskload_epi32(reinterpret_cast<const int *>(ranges), mask);
  const Vector scale = _mm256_castsi256_ps(_mm256_slli_epi32(stored, 16));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(stored, 16)) * (scale * Fill(0.0078125f));
}

// MR rows of x, from `m` on, times four rows.
template <int MR, typename Rows>
inline void Tile(const IntegerView &x, int64_t m, const Rows &rows, const Columns &columns, float *carried,
                 __m128 *out) {
  Vector sums[MR][4];
  Start(columns, carried, sums);
  int64_t section = columns.begin / x.section, group = columns.begin / rows.group_size;
  int64_t left = rows.group_size;  // of the group; a part begins with one
  for (int64_t begin = columns.begin; begin < columns.end; begin += x.section, ++section, left -= x.section) {
    if (left == 0) ++group, left = rows.group_size;
    __m256i whole[MR][4];
    SumProducts<MR>(x.numbers + m * x.k, x.k, rows, begin, std::min(columns.end, begin + x.section),
                    columns.fetch_share > 0, whole);
    for (int i = 0; i < MR; ++i) {
      const float scale = x.scales[(m + i) * x.sections + section];
      for (int j = 0; j < 4; ++j) {
        sums[i][j] = MultiplyAdd(_mm256_cvtepi32_ps(whole[i][j]), Fill(scale * rows.ranges[j][group].scale()), sums[i][j]);
      }
    }
  }
  for (int64_t g = 0; columns.is_last && g < rows.groups; g += kLanes) {
    const Mask mask = FirstLanes(rows.groups - g);
    for (int j = 0; j < 4; ++j) {
      const Vector bias = Biases(rows.ranges[j] + g, mask);
      for (int i = 0; i < MR; ++i) {
        sums[i][j] = MultiplyAdd(bias, Load(x.sums + (m + i) * x.groups + g, mask), sums[i][j]);
      }
    }
  }
  Finish(sums, columns, carried, out);
}

// A matrix (N, K); rows are widened once and kept where many rows of x go through them.
template <typename Bits>
class QuantizedMatrix : public StoredMatrix<Bits> {
 public:
  using Element = int16_t;
  using Inputs = IntegerInputs<Bits>;
  static constexpr int kRows = 2;  // a product needs a register before it is added
  static constexpr int kStep = kStep16, kFetching = 1;

  using StoredMatrix<Bits>::StoredMatrix;

  // use(rows) with the four rows from n on; beyond the last one, the last one again.
  template <typename Use>
  void WithRows(int64_t n, int64_t n_end, const Columns &columns, bool is_used_often, const Use &use) const {
    const QuantizedRows<Bits> rows{this->RowsAt(n, n_end)};
    if (!is_used_often) return use(rows);
    static thread_local std::vector<int16_t> buffer;
    int16_t *to = Scratch(buffer, 4 * this->k_);
    WidenedNumbers<Bits> widened{rows, {}};
    for (int j = 0; j < 4; ++j, to += this->k_) {
      FetchLines(rows.data[j] + (4 * this->k_ + columns.begin) / Bits::kPerByte,
                 (columns.end - columns.begin) / Bits::kPerByte);
      for (int64_t at = columns.begin; at < columns.end; at += kStep16) {
        Store(to + at, rows.Load(j, at));
      }
      widened.numbers[j] = to;
    }
    use(widened);
  }

  // One row as float32.
  void Row(int64_t n, float *to) const {
    const StoredRows<Bits> rows = this->RowsAt(n, n + 1);
    for (int64_t i = 0; i < this->k_; ++i) {
      const int64_t group = i / this->group_size_;
      const Range range = rows.ranges[0][group];
      to[i] = static_cast<float>(Bits::NumberAt(rows.data[0], i)) * range.scale() + range.bias();
    }
  }
};

}  // namespace llama31
