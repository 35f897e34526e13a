// What is done to one row of float32 at a time: norm, rotation, exponential; and the scratch memory for rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace llama31 {

// Scratch memory that grows to what the largest batch needed and is used again by every layer.
template <typename T>
T *Scratch(std::vector<T> &buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// The same, beginning at a cache line: a load across two lines takes twice as long.
template <typename T>
T *ScratchLines(std::vector<T> &buffer, int64_t count) {
  constexpr uintptr_t kLine = 64;
  const auto from = reinterpret_cast<uintptr_t>(Scratch(buffer, count + static_cast<int64_t>(kLine / sizeof(T))));
  return reinterpret_cast<T *>((from + kLine - 1) / kLine * kLine);
}

ALWAYS_INLINE Vector Exp(Vector x) {  // 2^n * polynomial, relative error under 2e-7 (Cephes expf)
  x = Max(Min(x, Fill(88.3f)), Fill(-87.3f));
  const Vector n = RoundToEven(x * Fill(1.44269504f));
  Vector r = NegativeMultiplyAdd(n, Fill(0.693359375f), x);
  r = NegativeMultiplyAdd(n, Fill(-2.12194440e-4f), r);
  Vector p = Fill(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = MultiplyAdd(p, r, Fill(c));
  }
  p = MultiplyAdd(p, r * r, r + Fill(1.0f));
  return TimesPowerOfTwo(p, n);
}

inline void RmsNorm(const float *x, const float *weight, float eps, int64_t width, float *out) {
  Vector squares = Zero();
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vector v = Load(x + i, FirstLanes(width - i));
    squares = MultiplyAdd(v, v, squares);
  }
  const Vector scale = Fill(1.0f / std::sqrt(SumOf(squares) / width + eps));
  for (int64_t i = 0; i < width; i += kLanes) {
    const Mask mask = FirstLanes(width - i);
    Store(out + i, mask, Load(x + i, mask) * scale * Load(weight + i, mask));
  }
}

// Turns the pairs (i, i + D/2) of one head in place.
inline void Rotate(float *head, const float *cosine, const float *sine, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * cosine[i] - second * sine[i];
    head[i + half] = second * cosine[i] + first * sine[i];
  }
}

// gate = silu(gate) * up.
inline void SwiGlu(float *gate, const float *up, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Mask mask = FirstLanes(width - i);
    const Vector g = Load(gate + i, mask), one_plus = Fill(1.0f) + Exp(Zero() - g);
    Store(gate + i, mask, g / one_plus * Load(up + i, mask));
  }
}

}  // namespace llama31
