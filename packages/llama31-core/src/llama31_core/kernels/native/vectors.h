// Vectors of float32 in the widest instructions that this is compiled for, AVX-512 or AVX2. Both are written with
// operators (+, -, *, /) and the functions here.
#pragma once

#include <algorithm>
#include <cstdint>

#include <immintrin.h>

// What keeps vectors in registers only where it is inlined, which GCC leaves to chance in large sources.
#define INLINED __attribute__((always_inline))  // of a lambda
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace llama31 {

#ifdef __AVX512F__

constexpr int kLanes = 16;
using Vector = __m512;
using Mask = __mmask16;
using FourMask = __mmask8;

inline Vector Zero() { return _mm512_setzero_ps(); }
inline Vector Fill(float x) { return _mm512_set1_ps(x); }
inline Vector Load(const float *p) { return _mm512_loadu_ps(p); }
inline Vector Load(const float *p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline void Store(float *p, Vector v) { _mm512_storeu_ps(p, v); }
inline void Store(float *p, Mask mask, Vector v) { _mm512_mask_storeu_ps(p, mask, v); }

inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }            // a b + c
inline Vector MultiplySubtract(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }       // a b - c
inline Vector NegativeMultiplyAdd(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }   // c - a b
inline Vector Max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector Min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector RoundToEven(Vector x) { return _mm512_roundscale_ps(x, 0); }
inline Vector TimesPowerOfTwo(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }  // n: whole, -126 to 127
inline float SumOf(Vector x) { return _mm512_reduce_add_ps(x); }
inline float MaxOf(Vector x) { return _mm512_reduce_max_ps(x); }

// The first `left` lanes, all if there are more.
inline Mask FirstLanes(int64_t left) { return left >= 16 ? 0xffff : static_cast<Mask>((1u << left) - 1); }

// The lanes i of which `from <= at + i <= last`.
inline Mask LanesBetween(int64_t at, int32_t from, int32_t last) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(at)));
  return _mm512_cmple_epi32_mask(places, _mm512_set1_epi32(last)) &
         _mm512_cmpge_epi32_mask(places, _mm512_set1_epi32(from));
}

inline Vector Keep(Mask mask, Vector x) { return _mm512_maskz_mov_ps(mask, x); }  // zero elsewhere
inline Vector Select(Mask mask, Vector x, Vector elsewhere) { return _mm512_mask_mov_ps(elsewhere, mask, x); }

// The sums of four vectors, in the four lanes of one.
inline __m128 SumEach(Vector a, Vector b, Vector c, Vector d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 sums = _mm512_add_ps(low, high);
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// The first `count` of four numbers.
inline FourMask FirstOfFour(int64_t count) { return static_cast<FourMask>((1u << std::min<int64_t>(4, count)) - 1); }
inline __m128 LoadFour(const float *p, FourMask mask) { return _mm_maskz_loadu_ps(mask, p); }
inline void StoreFour(float *p, FourMask mask, __m128 v) { _mm_mask_storeu_ps(p, mask, v); }

#else

constexpr int kLanes = 8;
using Vector = __m256;
using Mask = __m256i;  // all bits of a lane, or none
using FourMask = __m128i;

inline Vector Zero() { return _mm256_setzero_ps(); }
inline Vector Fill(float x) { return _mm256_set1_ps(x); }
inline Vector Load(const float *p) { return _mm256_loadu_ps(p); }
inline Vector Load(const float *p, Mask mask) { return _mm256_maskload_ps(p, mask); }
inline void Store(float *p, Vector v) { _mm256_storeu_ps(p, v); }
inline void Store(float *p, Mask mask, Vector v) {
  if (_mm256_testc_si256(mask, _mm256_set1_epi32(-1))) return Store(p, v);  // a masked store takes many cycles
  _mm256_maskstore_ps(p, mask, v);
}

inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector MultiplySubtract(Vector a, Vector b, Vector c) { return _mm256_fmsub_ps(a, b, c); }
inline Vector NegativeMultiplyAdd(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector Max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector Min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector RoundToEven(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector TimesPowerOfTwo(Vector x, Vector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline float SumOf(Vector x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float MaxOf(Vector x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m256i LaneNumbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Mask FirstLanes(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(left, 8))), LaneNumbers());
}
inline Mask LanesBetween(int64_t at, int32_t from, int32_t last) {
  const __m256i places = _mm256_add_epi32(LaneNumbers(), _mm256_set1_epi32(static_cast<int>(at)));
  return _mm256_and_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(last + 1), places),
                          _mm256_cmpgt_epi32(places, _mm256_set1_epi32(from - 1)));
}

inline Vector Keep(Mask mask, Vector x) { return _mm256_and_ps(_mm256_castsi256_ps(mask), x); }
inline Vector Select(Mask mask, Vector x, Vector elsewhere) {
  return _mm256_blendv_ps(elsewhere, x, _mm256_castsi256_ps(mask));
}

inline __m128 SumEach(Vector a, Vector b, Vector c, Vector d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

inline FourMask FirstOfFour(int64_t count) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(std::min<int64_t>(4, count))), _mm_setr_epi32(0, 1, 2, 3));
}
inline __m128 LoadFour(const float *p, FourMask mask) { return _mm_maskload_ps(p, mask); }
inline void StoreFour(float *p, FourMask mask, __m128 v) {
  if (_mm_testc_si128(mask, _mm_set1_epi32(-1))) return _mm_storeu_ps(p, v);  // as above
  _mm_maskstore_ps(p, mask, v);
}

#endif

}  // namespace llama31
