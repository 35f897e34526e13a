// A whole Llama from token ids to logits, over the paged cache of its layers.
//
// Shapes: B sequences, T new tokens of each, M blocks of a table, N rows of logits, E = dim, D width of a head,
// K key-value heads, C slots of the cache, V vocabulary.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layer.h"

namespace llama31 {

struct ModelInputs {
  const int32_t *tokens, *positions, *slots, *tables, *wanted;  // (B, T), (B, T), (B, T), (B, M), (N,)
  const float *settings, *frequencies;                          // as in Step; (D / 2,)
  Stored embedding, head;                                       // (V, E)
  const float *norm_out;                                        // (E,)
  std::vector<LayerWeights> layers;
  Shapes shapes;
  int64_t wanted_rows, vocabulary;
};

// Matrix: the kind that the layers have; Table: that of embedding and head.
template <typename Matrix, typename Table>
class Model {
 public:
  explicit Model(const ModelInputs &in) : in_(in), rows_(in.shapes.batch * in.shapes.tokens) {}

  void Run(float *logits) {
    const int64_t dim = in_.shapes.dim;
    float *x = Buffer<0>(rows_ * dim), *turns = Buffer<1>(rows_ * in_.shapes.width);
    Embed(x);
    Turn(turns);
    const Step step{turns, in_.positions, in_.slots, in_.tables, in_.settings};
    for (const LayerWeights &weights : in_.layers) Layer<Matrix>(in_.shapes, step, weights, x).Run();
    Head(x, logits);
  }

 protected:  // as in Layer
  int64_t group_size() const { return static_cast<int64_t>(in_.settings[2]); }
  Table Of(const Stored &table) const { return {table, in_.shapes.dim, group_size()}; }

  template <int kIndex>
  static float *Buffer(int64_t count) {
    static thread_local std::vector<float> buffer;
    return Scratch(buffer, count);
  }

  static typename Table::Inputs &OwnInputs() {
    static thread_local typename Table::Inputs inputs;
    return inputs;
  }

  // Rows of the embedding as float32. Ids are checked by the engine.
  void Embed(float *x) {
    const int64_t dim = in_.shapes.dim;
    const Table table = Of(in_.embedding);
    for (int64_t r = 0; r < rows_; ++r) table.Row(in_.tokens[r], x + r * dim);
  }

  // Cosines (B, T, D / 2), then sines.
  void Turn(float *turns) {
    const int64_t half = in_.shapes.width / 2;
    pool_.For(rows_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * half; i < end * half; ++i) {
        const float angle = static_cast<float>(in_.positions[i / half]) * in_.frequencies[i % half];
        turns[i] = std::cos(angle);
        turns[rows_ * half + i] = std::sin(angle);
      }
    });
  }

  // The last norm and the product with the head, of the wanted rows alone.
  void Head(const float *x, float *logits) {
    typename Table::Inputs &input = OwnInputs();
    const int64_t dim = in_.shapes.dim, count = in_.wanted_rows, vocabulary = in_.vocabulary;
    input.Reset(count, dim, group_size());
    float *normed = Buffer<1>(dim);
    for (int64_t r = 0; r < count; ++r) {
      RmsNorm(x + in_.wanted[r] * dim, in_.norm_out, in_.settings[0], dim, normed);
      input.Put(r, normed);
    }
    const Table head = Of(in_.head);
    ForWeightRows(vocabulary, [&](int64_t begin, int64_t end) {
      MatmulRows(input, head, count, begin, end,
                 [&](int64_t m, int64_t n, __m128 v, FourMask kept) {
                   StoreFour(logits + m * vocabulary + n, kept, v);
                 });
    });
  }

  ThreadPool &pool_ = ThreadPool::Get();
  const ModelInputs &in_;
  int64_t rows_;
};

}  // namespace llama31
