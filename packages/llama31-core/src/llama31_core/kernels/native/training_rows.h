// What training does to rows of float32 between its products, each in one pass over memory, and the gradients of it:
// norm, rotation, SwiGLU, cross-entropy. Sums over rows are added in an order that no number of threads changes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"
#include "thread_pool.h"

namespace llama31 {

// Calls body(i, mask) for vectors of the numbers begin .. end.
template <typename Body>
inline void ForVectors(int64_t begin, int64_t end, const Body &body) {
  for (int64_t i = begin; i < end; i += 16) body(i, Mask(end - i));
}

inline __m512 Sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, Exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

struct TrainingNorm {
  const float *x, *weight;  // (N, E), (E)
  float eps;
  int64_t rows, width;

  void Forward(float *out) const {
    ThreadPool::Get().For(rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) RmsNorm(x + r * width, weight, eps, width, out + r * width);
    });
  }

  void Backward(const float *d_out, float *d_x, float *d_weight) const {
    static std::vector<float> scratch;
    const int64_t chunks = (rows + kChunk - 1) / kChunk;
    float *parts = Scratch(scratch, chunks * width);
    ThreadPool::Get().For(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float *own = parts + c * width;
        std::fill(own, own + width, 0.0f);
        for (int64_t r = c * kChunk; r < std::min(rows, (c + 1) * kChunk); ++r) {
          BackwardRow(x + r * width, d_out + r * width, d_x + r * width, own);
        }
      }
    });
    std::fill(d_weight, d_weight + width, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t i = 0; i < width; ++i) d_weight[i] += parts[c * width + i];
    }
  }

 private:
  static constexpr int64_t kChunk = 64;  // rows whose share of the weight's gradient is added up in a row

  // With r = 1 / rms(x): d_x = r w d - x r^3 mean(x w d), and r x d is added to the weight's gradient.
  void BackwardRow(const float *in, const float *d, float *d_in, float *d_weight) const {
    __m512 squares = _mm512_setzero_ps(), products = _mm512_setzero_ps();
    ForVectors(0, width, [&](int64_t i, __mmask16 mask) {
      const __m512 v = _mm512_maskz_loadu_ps(mask, in + i);
      const __m512 slope = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, d + i), _mm512_maskz_loadu_ps(mask, weight + i));
      squares = _mm512_fmadd_ps(v, v, squares);
      products = _mm512_fmadd_ps(v, slope, products);
    });
    const float factor = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
    const __m512 r = _mm512_set1_ps(factor);
    const __m512 share = _mm512_set1_ps(factor * factor * factor * _mm512_reduce_add_ps(products) / width);
    ForVectors(0, width, [&](int64_t i, __mmask16 mask) {
      const __m512 v = _mm512_maskz_loadu_ps(mask, in + i), slope = _mm512_maskz_loadu_ps(mask, d + i);
      const __m512 own = _mm512_mul_ps(r, _mm512_mul_ps(slope, _mm512_maskz_loadu_ps(mask, weight + i)));
      _mm512_mask_storeu_ps(d_in + i, mask, _mm512_fnmadd_ps(v, share, own));
      const __m512 sum = _mm512_fmadd_ps(_mm512_mul_ps(r, v), slope, _mm512_maskz_loadu_ps(mask, d_weight + i));
      _mm512_mask_storeu_ps(d_weight + i, mask, sum);
    });
  }
};

// out = silu(gate) * up.
inline void TrainingSwiGlu(const float *gate, const float *up, int64_t count, float *out) {
  ThreadPool::Get().For(count, 1 << 14, [&](int64_t begin, int64_t end) {
    ForVectors(begin, end, [&](int64_t i, __mmask16 mask) {
      const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i), u = _mm512_maskz_loadu_ps(mask, up + i);
      _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(g, Sigmoid(g)), u));
    });
  });
}

inline void TrainingSwiGluGradient(const float *gate, const float *up, const float *d_out, int64_t count, float *d_gate,
                                   float *d_up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  ThreadPool::Get().For(count, 1 << 14, [&](int64_t begin, int64_t end) {
    ForVectors(begin, end, [&](int64_t i, __mmask16 mask) {
      const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i), u = _mm512_maskz_loadu_ps(mask, up + i);
      const __m512 d = _mm512_maskz_loadu_ps(mask, d_out + i), s = Sigmoid(g);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));  // of silu
      _mm512_mask_storeu_ps(d_up + i, mask, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
      _mm512_mask_storeu_ps(d_gate + i, mask, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
    });
  });
}

// Turns the pairs (i, i + D/2) of every head of x (N, H, D) by the angles of its row, (N, D), or back by them.
inline void TrainingTurn(const float *x, const float *cosines, const float *sines, int64_t rows, int64_t heads,
                         int64_t width, bool is_back, float *out) {
  const int64_t half = width / 2;
  const __m512 sign = _mm512_set1_ps(is_back ? -1.0f : 1.0f);
  ThreadPool::Get().For(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin * heads; item < end * heads; ++item) {
      const float *from = x + item * width, *cosine = cosines + item / heads * width;
      const float *sine = sines + item / heads * width;
      float *to = out + item * width;
      ForVectors(0, half, [&](int64_t i, __mmask16 mask) {
        const __m512 c = _mm512_maskz_loadu_ps(mask, cosine + i);
        const __m512 s = _mm512_mul_ps(sign, _mm512_maskz_loadu_ps(mask, sine + i));
        const __m512 first = _mm512_maskz_loadu_ps(mask, from + i);
        const __m512 second = _mm512_maskz_loadu_ps(mask, from + half + i);
        _mm512_mask_storeu_ps(to + i, mask, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
        _mm512_mask_storeu_ps(to + half + i, mask, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
      });
    }
  });
}

// Cross-entropy of a row of logits (V) and its gradient, softmax - label; both zero for a label below zero.
inline float CrossEntropyRow(const float *logits, int32_t label, int64_t vocab, float *d_logits) {
  if (label < 0) {
    std::fill(d_logits, d_logits + vocab, 0.0f);
    return 0.0f;
  }
  const __m512 lowest = _mm512_set1_ps(-3.0e38f);
  __m512 largest = lowest;
  ForVectors(0, vocab, [&](int64_t i, __mmask16 mask) {
    largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(lowest, mask, logits + i));
  });
  const float top = _mm512_reduce_max_ps(largest);
  const __m512 tops = _mm512_set1_ps(top);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  ForVectors(0, vocab, [&](int64_t i, __mmask16 mask) {
    const __m512 e = _mm512_maskz_mov_ps(mask, Exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, logits + i), tops)));
    _mm512_mask_storeu_ps(d_logits + i, mask, e);
    sums[i / 16 % 2] = _mm512_add_ps(sums[i / 16 % 2], e);
  });
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  const __m512 share = _mm512_set1_ps(1.0f / sum);
  ForVectors(0, vocab, [&](int64_t i, __mmask16 mask) {
    _mm512_mask_storeu_ps(d_logits + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, d_logits + i), share));
  });
  d_logits[label] -= 1.0f;
  return std::log(sum) + top - logits[label];
}

inline void CrossEntropy(const float *logits, const int32_t *labels, int64_t rows, int64_t vocab, float *losses,
                         float *d_logits) {
  ThreadPool::Get().For(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      losses[r] = CrossEntropyRow(logits + r * vocab, labels[r], vocab, d_logits + r * vocab);
    }
  });
}

}  // namespace llama31
