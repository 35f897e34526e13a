// One Llama layer from its input rows to its output rows: float32 activations, weights of any kind of matrix.
//
// Shapes: B sequences, T new tokens of each, E = dim, H query heads, K key-value heads, D width of a head, F = ffn_dim.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "rows.h"
#include "thread_pool.h"

namespace llama31 {

constexpr int64_t kTokenTile = 16;  // tokens whose queries go through the keys together

struct Shapes {
  int64_t batch, tokens, dim, q_width, kv_width, kv_heads, width, ffn, table_length;
};

struct LayerWeights {
  const float *attention_norm;
  Stored wq, wk, wv, wo;
  const float *ffn_norm;
  Stored w1, w2, w3;
  void *keys, *values;  // (C, K, D), of bfloat16 or of float32
  bool has_bf16_cache;
};

// What a pass has for all layers: cosines, then sines; where tokens stand and lie; eps, block_size and the
// columns of a quantised group.
struct Step {
  const float *turns;
  const int32_t *positions, *slots, *tables;
  const float *settings;
};

// The phases of a layer, over buffers that all layers share.
template <typename Matrix>
class Layer {
  using Inputs = typename Matrix::Inputs;

 public:
  // x (B, T, E) goes in and comes out.
  Layer(const Shapes &in, const Step &step, const LayerWeights &weights, float *x)
      : in_(in),
        step_(step),
        weights_(weights),
        x_(x),
        rows_(in.batch * in.tokens),
        group_(in.q_width / in.width / in.kv_heads),
        q_(Buffer<0>(rows_ * in.q_width)),
        k_(Buffer<1>(rows_ * in.kv_width)),
        v_(Buffer<2>(rows_ * in.kv_width)),
        mixed_(Buffer<3>(rows_ * in.q_width)),
        gated_(Buffer<4>(rows_ * 2 * in.ffn)),
        input_(OwnInputs()) {}

  void Run() {
    Norm(weights_.attention_norm);
    ProjectHeads();
    TurnAndStore();
    AttendAll();
    Take(mixed_, in_.q_width, in_.q_width);
    ProjectAndAdd(weights_.wo, in_.q_width);
    Norm(weights_.ffn_norm);
    Gate();
    Take(gated_, 2 * in_.ffn, in_.ffn);
    ProjectAndAdd(weights_.w2, in_.ffn);
  }

 protected:  // tools/bench/phases.cc times them one by one
  int64_t group_size() const { return static_cast<int64_t>(step_.settings[2]); }
  Matrix Of(const Stored &weight, int64_t k) const { return {weight, k, group_size()}; }

  template <int kIndex>
  static float *Buffer(int64_t count) {
    static thread_local std::vector<float> buffer;
    return Scratch(buffer, count);
  }

  static Inputs &OwnInputs() {
    static thread_local Inputs inputs;
    return inputs;
  }

  // Rows of x, normed, become the input of the next product.
  void Norm(const float *weight) {
    input_.Reset(rows_, in_.dim, group_size());
    pool_.For(rows_, 16, [&](int64_t begin, int64_t end) {
      static thread_local std::vector<float> buffer;
      float *normed = Scratch(buffer, in_.dim);
      for (int64_t r = begin; r < end; ++r) {
        RmsNorm(x_ + r * in_.dim, weight, step_.settings[0], in_.dim, normed);
        input_.Put(r, normed);
      }
    });
  }

  // The first `width` floats of rows that are `stride` apart become the input of the next product.
  void Take(const float *x, int64_t stride, int64_t width) {
    input_.Reset(rows_, width, group_size());
    pool_.For(rows_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) input_.Put(r, x + r * stride);
    });
  }

  // wq, wk and wv as if they were one matrix.
  void ProjectHeads() {
    const int64_t q_end = in_.q_width, k_end = q_end + in_.kv_width, all = k_end + in_.kv_width;
    ForWeightRows(all, [&](int64_t begin, int64_t end) {
      const auto part = [&](int64_t from, int64_t to, const Stored &w, const auto &row_of) {
        const int64_t first = std::max(begin, from), last = std::min(end, to);
        if (first >= last) return;
        MatmulRows(input_, Of(w, in_.dim), rows_, first - from, last - from,
                   [&](int64_t m, int64_t n, __m128 v, FourMask kept) { StoreFour(row_of(m) + n, kept, v); });
      };
      part(0, q_end, weights_.wq, [&](int64_t m) { return q_ + m * in_.q_width; });
      part(q_end, k_end, weights_.wk, [&](int64_t m) { return k_ + m * in_.kv_width; });
      part(k_end, all, weights_.wv, [&](int64_t m) { return v_ + m * in_.kv_width; });
    });
  }

  // use(keys, values) of the cache in its type.
  template <typename Use>
  void WithCache(const Use &use) const {
    if (weights_.has_bf16_cache) return use(static_cast<Bf16 *>(weights_.keys), static_cast<Bf16 *>(weights_.values));
    use(static_cast<float *>(weights_.keys), static_cast<float *>(weights_.values));
  }

  // Turns queries and keys, and writes keys and values to the cache.
  void TurnAndStore() {
    pool_.For(rows_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float *cosine = step_.turns + r * in_.width / 2, *sine = cosine + rows_ * in_.width / 2;
        float *query = q_ + r * in_.q_width, *key = k_ + r * in_.kv_width;
        for (int64_t at = 0; at < in_.q_width; at += in_.width) Rotate(query + at, cosine, sine, in_.width);
        for (int64_t at = 0; at < in_.kv_width; at += in_.width) Rotate(key + at, cosine, sine, in_.width);
        WithCache([&](auto *keys, auto *values) {
          const int64_t at = step_.slots[r] * in_.kv_width;
          Convert(key, keys + at, in_.kv_width);
          Convert(v_ + r * in_.kv_width, values + at, in_.kv_width);
        });
      }
    });
  }

  void AttendAll() {
    const int64_t tiles = (in_.tokens + kTokenTile - 1) / kTokenTile;
    pool_.For(in_.batch * in_.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      static thread_local Queries queries;
      static thread_local std::vector<int64_t> offsets_buffer;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i / (in_.batch * in_.kv_heads), b = i / in_.kv_heads % in_.batch;
        const int64_t kv_head = i % in_.kv_heads;
        queries.Clear();
        for (int64_t t = tile * kTokenTile; t < std::min(in_.tokens, (tile + 1) * kTokenTile); ++t) {
          const int64_t r = b * in_.tokens + t;
          for (int64_t g = 0; g < group_; ++g) {
            const int64_t at = r * in_.q_width + (kv_head * group_ + g) * in_.width;
            queries.Add(q_ + at, mixed_ + at, step_.positions[r] + 1);
          }
        }
        int64_t *offsets = Scratch(offsets_buffer, queries.longest);
        FindTokens(step_.tables + b * in_.table_length, queries.longest, static_cast<int64_t>(step_.settings[1]),
                   in_.kv_width, offsets);
        WithCache([&](const auto *keys, const auto *values) {
          const int64_t head = kv_head * in_.width;
          Attend(queries, Sequence<std::decay_t<decltype(*keys)>>{keys + head, values + head, offsets, in_.width});
        });
      }
    });
  }

  void ProjectAndAdd(const Stored &w, int64_t k) {
    ForWeightRows(in_.dim, [&](int64_t begin, int64_t end) {
      MatmulRows(input_, Of(w, k), rows_, begin, end,
                 [&](int64_t m, int64_t n, __m128 v, FourMask kept) {
                   float *at = x_ + m * in_.dim + n;
                   StoreFour(at, kept, _mm_add_ps(LoadFour(at, kept), v));
                 });
    });
  }

  // silu(w1 x) * w3 x, in the first half of each row of gated_.
  void Gate() {
    ForWeightRows(in_.ffn, [&](int64_t begin, int64_t end) {
      for (const auto &[w, shift] : {std::pair{weights_.w1, int64_t{0}}, std::pair{weights_.w3, in_.ffn}}) {
        MatmulRows(input_, Of(w, in_.dim), rows_, begin, end,
                   [&, shift = shift](int64_t m, int64_t n, __m128 v, FourMask kept) {
                     StoreFour(gated_ + m * 2 * in_.ffn + shift + n, kept, v);
                   });
      }
      for (int64_t r = 0; r < rows_; ++r) {
        float *gate = gated_ + r * 2 * in_.ffn;
        SwiGlu(gate + begin, gate + in_.ffn + begin, end - begin);
      }
    });
  }

  ThreadPool &pool_ = ThreadPool::Get();
  const Shapes &in_;
  const Step &step_;
  const LayerWeights &weights_;
  float *x_;
  int64_t rows_, group_;
  float *q_, *k_, *v_, *mixed_, *gated_;
  Inputs &input_;
};

}  // namespace llama31
