// The types that weights and cache have, float32 and bfloat16: how a product loads and adds them, and from one to the
// other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace llama31 {

struct Bf16 {
  uint16_t bits;

  float wide() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
  }
};

// Lanes of float32 from numbers of either type: all, or the first `count` and then zeros.
inline Vector LoadWide(const float *p) { return Load(p); }
inline Vector LoadWide(const float *p, int64_t count) { return Load(p, FirstLanes(count)); }

#ifdef __AVX512F__

inline Vector WidenLanes(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline Vector LoadWide(const Bf16 *p) { return WidenLanes(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Vector LoadWide(const Bf16 *p, int64_t count) {
  return WidenLanes(_mm256_maskz_loadu_epi16(FirstLanes(count), p));
}

#else

inline Vector LoadWide(const Bf16 *p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vector LoadWide(const Bf16 *p, int64_t count) {
  if (count >= kLanes) return LoadWide(p);
  Bf16 some[kLanes] = {};
  std::copy(p, p + count, some);
  return LoadWide(some);
}

#endif

// One step of K: how many elements, how to load them (the last step is masked) and how to multiply and add.
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kStep = kLanes;
  static Vector Load(const float *p) { return llama31::Load(p); }
  static Vector Load(const float *p, int count) { return llama31::Load(p, FirstLanes(count)); }
  static Vector Accumulate(Vector sum, Vector a, Vector b) { return MultiplyAdd(a, b, sum); }
};

// `Factor<T>`: what rows of x are rounded to, to be multiplied with a weight of type T.
#ifdef __AVX512BF16__

template <typename T>
using Factor = T;

template <>
struct Lanes<Bf16> {
  static constexpr int kStep = 32;
  static __m512i Load(const Bf16 *p) { return _mm512_loadu_si512(p); }
  static __m512i Load(const Bf16 *p, int count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
  }
  static Vector Accumulate(Vector sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

#else

template <typename T>
using Factor = float;

// Loaded as float32: there is no product of bfloat16.
template <>
struct Lanes<Bf16> {
  static constexpr int kStep = kLanes;
  static Vector Load(const Bf16 *p) { return LoadWide(p); }
  static Vector Load(const Bf16 *p, int count) { return LoadWide(p, count); }
};

#endif

// Rows of float32 as a product or the cache takes them: as they are, or rounded to the nearest bfloat16, of two the even
// one.
inline void Convert(const float *from, float *to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

#ifdef __AVX512BF16__
inline void Convert(const float *from, Bf16 *to, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i), (__m256i)rounded);
  }
  if (i < count) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i));
    _mm256_mask_storeu_epi16(to + i, mask, (__m256i)rounded);
  }
}
#else
inline void Convert(const float *from, Bf16 *to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    to[i].bits = static_cast<uint16_t>(rounded >> 16);
  }
}
#endif

// Rows of either type as float32.
inline void Widen(const float *from, float *to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void Widen(const Bf16 *from, float *to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

}  // namespace llama31
