// Causal attention of whole sequences and its gradients, float32: a tile of queries over the keys that it sees, so that
// scores never leave a core's cache and nothing that causality or another document hides is computed.
//
// Shapes: B sequences, T tokens, H query heads, K key-value heads, D width of a head (a multiple of 16). Query i sees the
// keys starts[i] .. i. After Dao 2023 (FlashAttention-2), section 3.1, with whole rows of scores in the place of
// rescaled parts of them: a row of 8,192 keys for 64 queries is 2 MB.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "rows.h"
#include "thread_pool.h"

namespace llama31 {

class TrainingAttention {
 public:
  const float *q, *k, *v;
  const int32_t *starts;  // (B, T)
  int64_t batch, tokens, heads, kv_heads, width;

  void Forward(float *out) const {
    ThreadPool::Get().For(batch * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) ForwardHead(item / heads, item % heads, out);
    });
  }

  void Backward(const float *out, const float *d_out, float *d_q, float *d_k, float *d_v) const {
    // Each query head has its own gradients of keys and values, which are then added in a fixed order.
    static std::vector<float> parts;
    const int64_t size = tokens * width;
    float *own = Scratch(parts, 2 * batch * heads * size);
    ThreadPool::Get().For(batch * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        BackwardHead(item / heads, item % heads, out, d_out, d_q, own + 2 * item * size, own + (2 * item + 1) * size);
      }
    });
    ThreadPool::Get().For(batch * kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) AddHeads(item / kv_heads, item % kv_heads, own, d_k, d_v);
    });
  }

 private:
  // Queries of a tile: as many as have their weights and slopes in the second-level cache.
  int64_t tile_rows() const {
    const int64_t fit = 384 * 1024 / (2 * static_cast<int64_t>(sizeof(float)) * padded());
    return std::clamp<int64_t>((fit + 3) / 6 * 6, 12, 60);
  }

  struct Tile {
    int64_t first, count, key, num_keys;  // queries; keys from a multiple of 16 on
    int64_t columns, row;                 // of the scores: num_keys filled up to whole vectors; memory from row to row
  };

  int64_t group() const { return heads / kv_heads; }
  int64_t q_row() const { return heads * width; }
  int64_t kv_row() const { return kv_heads * width; }
  int64_t padded() const { return (tokens + 15) / 16 * 16; }
  // An odd number of cache lines: rows a power of two apart would share one set of the cache.
  static int64_t Odd(int64_t count) { return count / 16 % 2 == 0 ? count + 16 : count; }
  const float *QueryOf(const float *x, int64_t b, int64_t h) const { return x + b * tokens * q_row() + h * width; }
  const float *KeyOf(const float *x, int64_t b, int64_t h) const {
    return x + b * tokens * kv_row() + h / group() * width;
  }

  Tile TileAt(int64_t b, int64_t first) const {
    Tile tile;
    tile.first = first;
    tile.count = std::min(tile_rows(), tokens - first);
    tile.key = starts[b * tokens + first] / 16 * 16;
    tile.num_keys = first + tile.count - tile.key;
    tile.columns = (tile.num_keys + 15) / 16 * 16;
    tile.row = Odd(tile.columns);
    return tile;
  }

  // Panels of 16 tokens, (T / 16, D, 16), with zeros behind the last token.
  void Transpose(const float *rows, float *out) const {
    for (int64_t t = 0; t < padded(); ++t) {
      float *to = out + t / 16 * panel() + t % 16;
      for (int64_t d = 0; d < width; ++d) to[d * 16] = t < tokens ? rows[t * kv_row() + d] : 0.0f;
    }
  }
  int64_t panel() const { return 16 * width; }

  // Softmax of the scores of a tile, (count, row); zero for a key that is not seen.
  void Weights(int64_t b, const Tile &tile, const float *query, const float *keys_t, float *p) const {
    Gemm{query + tile.first * q_row(), q_row(), 1, keys_t + tile.key * width, 16, panel(), p, tile.row, tile.count,
         tile.columns, width, false}.Run();
    const Vector scale = Fill(1.0f / std::sqrt(static_cast<float>(width))), hidden = Fill(-1e30f);
    for (int64_t r = 0; r < tile.count; ++r) {
      float *row = p + r * tile.row;
      const auto last = static_cast<int32_t>(tile.first + r - tile.key);
      const auto from = static_cast<int32_t>(starts[b * tokens + tile.first + r] - tile.key);
      const auto seen = [&](int64_t i) { return LanesBetween(i, from, last); };
      Vector largest = hidden;
      for (int64_t i = 0; i < tile.columns; i += kLanes) {
        const Vector score = Select(seen(i), Load(row + i) * scale, hidden);
        Store(row + i, score);
        largest = Max(largest, score);
      }
      const Vector top = Fill(MaxOf(largest));
      Vector sum = Zero();
      for (int64_t i = 0; i < tile.columns; i += kLanes) {
        const Vector e = Keep(seen(i), Exp(Load(row + i) - top));
        Store(row + i, e);
        sum += e;
      }
      const Vector share = Fill(1.0f / SumOf(sum));
      for (int64_t i = 0; i < tile.columns; i += kLanes) {
        Store(row + i, Load(row + i) * share);
      }
    }
  }

  void ForwardHead(int64_t b, int64_t h, float *out) const {
    thread_local std::vector<float> keys, scores;
    float *keys_t = Scratch(keys, width * padded());
    Transpose(KeyOf(k, b, h), keys_t);
    const float *values = KeyOf(v, b, h);
    float *to = out + b * tokens * q_row() + h * width;
    for (int64_t first = 0; first < tokens; first += tile_rows()) {
      const Tile tile = TileAt(b, first);
      float *p = Scratch(scores, tile_rows() * tile.row);
      Weights(b, tile, QueryOf(q, b, h), keys_t, p);
      Gemm{p, tile.row, 1, values + tile.key * kv_row(), kv_row(), 16, to + first * q_row(), q_row(), tile.count, width,
           tile.num_keys, false}.Run();
    }
  }

  void BackwardHead(int64_t b, int64_t h, const float *out, const float *d_out, float *d_q, float *d_k,
                    float *d_v) const {
    thread_local std::vector<float> keys, values, scores, slopes;
    float *keys_t = Scratch(keys, width * padded()), *values_t = Scratch(values, width * padded());
    const float *query = QueryOf(q, b, h), *key = KeyOf(k, b, h);
    const float *own_out = QueryOf(out, b, h), *own_d_out = QueryOf(d_out, b, h);
    float *own_d_q = d_q + b * tokens * q_row() + h * width;
    Transpose(key, keys_t);
    Transpose(KeyOf(v, b, h), values_t);
    std::fill(d_k, d_k + tokens * width, 0.0f);
    std::fill(d_v, d_v + tokens * width, 0.0f);
    for (int64_t first = 0; first < tokens; first += tile_rows()) {
      const Tile tile = TileAt(b, first);
      float *p = Scratch(scores, tile_rows() * tile.row), *d_s = Scratch(slopes, tile_rows() * tile.row);
      Weights(b, tile, query, keys_t, p);
      const float *d_o = own_d_out + first * q_row();
      Gemm{d_o, q_row(), 1, values_t + tile.key * width, 16, panel(), d_s, tile.row, tile.count, tile.columns, width,
           false}.Run();
      for (int64_t r = 0; r < tile.count; ++r) {
        Slopes(p + r * tile.row, tile.columns, own_out + (first + r) * q_row(), d_o + r * q_row(), d_s + r * tile.row);
      }
      Gemm{d_s, tile.row, 1, key + tile.key * kv_row(), kv_row(), 16, own_d_q + first * q_row(), q_row(), tile.count,
           width, tile.num_keys, false}.Run();
      Gemm{p, 1, tile.row, d_o, q_row(), 16, d_v + tile.key * width, width, tile.num_keys, width, tile.count, true}
          .Run();
      Gemm{d_s, 1, tile.row, query + first * q_row(), q_row(), 16, d_k + tile.key * width, width, tile.num_keys, width,
           tile.count, true}.Run();
    }
  }

  // d_s = p * (d_p - sum(out * d_out)) / sqrt(D), where d_s holds d_p.
  void Slopes(const float *p, int64_t count, const float *out, const float *d_out, float *d_s) const {
    Vector sum = Zero();
    for (int64_t i = 0; i < width; i += kLanes) {
      sum = MultiplyAdd(Load(out + i), Load(d_out + i), sum);
    }
    const Vector mean = Fill(SumOf(sum));
    const Vector scale = Fill(1.0f / std::sqrt(static_cast<float>(width)));
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vector slope = Load(p + i) * (Load(d_s + i) - mean);
      Store(d_s + i, slope * scale);
    }
  }

  void AddHeads(int64_t b, int64_t kv_head, const float *own, float *d_k, float *d_v) const {
    const int64_t size = tokens * width, first = b * heads + kv_head * group();
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t to = (b * tokens + t) * kv_row() + kv_head * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        Vector keys = Zero(), values = Zero();
        for (int64_t g = 0; g < group(); ++g) {
          const float *part = own + 2 * (first + g) * size + t * width + i;
          keys += Load(part);
          values += Load(part + size);
        }
        Store(d_k + to + i, keys);
        Store(d_v + to + i, values);
      }
    }
  }
};

}  // namespace llama31
