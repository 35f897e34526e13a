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
  for (int64_t i = begin; i < end; i += kLanes) body(i, FirstLanes(end - i));
}

inline Vector Sigmoid(Vector x) {
  const Vector one = Fill(1.0f);
  return one / (one + Exp(Zero() - x));
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
    Vector squares = Zero(), products = Zero();
    ForVectors(0, width, [&](int64_t i, Mask mask) {
      const Vector v = Load(in + i, mask);
      const Vector slope = Load(d + i, mask) * Load(weight + i, mask);
      squares = MultiplyAdd(v, v, squares);
      products = MultiplyAdd(v, slope, products);
    });
    const float factor = 1.0f / std::sqrt(SumOf(squares) / width + eps);
    const Vector r = Fill(factor);
    const Vector share = Fill(factor * factor * factor * SumOf(products) / width);
    ForVectors(0, width, [&](int64_t i, Mask mask) {
      const Vector v = Load(in + i, mask), slope = Load(d + i, mask);
      const Vector own = r * (slope * Load(weight + i, mask));
      Store(d_in + i, mask, NegativeMultiplyAdd(v, share, own));
      const Vector sum = MultiplyAdd(r * v, slope, Load(d_weight + i, mask));
      Store(d_weight + i, mask, sum);
    });
  }
};

// out = silu(gate) * up.
inline void TrainingSwiGlu(const float *gate, const float *up, int64_t count, float *out) {
  ThreadPool::Get().For(count, 1 << 14, [&](int64_t begin, int64_t end) {
    ForVectors(begin, end, [&](int64_t i, Mask mask) {
      const Vector g = Load(gate + i, mask), u = Load(up + i, mask);
      Store(out + i, mask, g * Sigmoid(g) * u);
    });
  });
}

inline void TrainingSwiGluGradient(const float *gate, const float *up, const float *d_out, int64_t count, float *d_gate,
                                   float *d_up) {
  const Vector one = Fill(1.0f);
  ThreadPool::Get().For(count, 1 << 14, [&](int64_t begin, int64_t end) {
    ForVectors(begin, end, [&](int64_t i, Mask mask) {
      const Vector g = Load(gate + i, mask), u = Load(up + i, mask);
      const Vector d = Load(d_out + i, mask), s = Sigmoid(g);
      const Vector slope = s * MultiplyAdd(g, one - s, one);  // of silu
      Store(d_up + i, mask, d * (g * s));
      Store(d_gate + i, mask, d * u * slope);
    });
  });
}

// Turns the pairs (i, i + D/2) of every head of x (N, H, D) by the angles of its row, (N, D), or back by them.
inline void TrainingTurn(const float *x, const float *cosines, const float *sines, int64_t rows, int64_t heads,
                         int64_t width, bool is_back, float *out) {
  const int64_t half = width / 2;
  const Vector sign = Fill(is_back ? -1.0f : 1.0f);
  ThreadPool::Get().For(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin * heads; item < end * heads; ++item) {
      const float *from = x + item * width, *cosine = cosines + item / heads * width;
      const float *sine = sines + item / heads * width;
      float *to = out + item * width;
      ForVectors(0, half, [&](int64_t i, Mask mask) {
        const Vector c = Load(cosine + i, mask);
        const Vector s = sign * Load(sine + i, mask);
        const Vector first = Load(from + i, mask);
        const Vector second = Load(from + half + i, mask);
        Store(to + i, mask, MultiplySubtract(first, c, second * s));
        Store(to + half + i, mask, MultiplyAdd(second, c, first * s));
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
  const Vector lowest = Fill(-3.0e38f);
  Vector largest = lowest;
  ForVectors(0, vocab, [&](int64_t i, Mask mask) {
    largest = Max(largest, Select(mask, Load(logits + i, mask), lowest));
  });
  const float top = MaxOf(largest);
  const Vector tops = Fill(top);
  Vector sums[2] = {Zero(), Zero()};
  ForVectors(0, vocab, [&](int64_t i, Mask mask) {
    const Vector e = Keep(mask, Exp(Load(logits + i, mask) - tops));
    Store(d_logits + i, mask, e);
    sums[i / kLanes % 2] += e;
  });
  const float sum = SumOf(sums[0] + sums[1]);
  const Vector share = Fill(1.0f / sum);
  ForVectors(0, vocab, [&](int64_t i, Mask mask) {
    Store(d_logits + i, mask, Load(d_logits + i, mask) * share);
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
