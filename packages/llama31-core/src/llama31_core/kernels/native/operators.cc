// The pieces of a Llama model as MindSpore custom operators for a CPU with AVX-512 and its bfloat16 dot product.
//
// Shapes: B sequences, T new tokens of each, E = dim, D width of a head, K key-value heads, C slots of the cache,
// M blocks of a table, V vocabulary. Each operator returns 0, or 1 if it was called with other arguments than these.

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "layer.h"

namespace mindspore {
class AotExtra;
}

namespace llama31 {
namespace {

int64_t Count(int ndim, const int64_t *shape) {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i) count *= shape[i];
  return count;
}

std::vector<int64_t> FirstShape(const int *ndims, int64_t **shapes) { return {shapes[0], shapes[0] + ndims[0]}; }

bool IsBf16(const char *dtype) { return std::string(dtype) == "bfloat16"; }

template <typename T>
void Linear(const float *x, const void *w, int64_t rows, int64_t k, int64_t n_rows, float *out) {
  static thread_local std::vector<T> input_buffer;
  T *input = Scratch(input_buffer, rows * k);
  Convert(x, input, rows * k);
  ForWeightRows(n_rows, [&](int64_t begin, int64_t end) {
    MatmulRows(input, static_cast<const T *>(w), rows, k, begin, end,
               [&](int64_t m, int64_t n, __m128 v, __mmask8 kept) {
                 _mm_mask_storeu_ps(out + m * n_rows + n, kept, v);
               });
  });
}

}  // namespace
}  // namespace llama31

using namespace llama31;

// x (B, T, E), turns (2, B, T, D / 2), positions (B, T), slots (B, T), tables (B, M), settings (2,),
// attention_norm (E,), wq, wk, wv, wo, ffn_norm (E,), w1, w2, w3, key and value cache (C, K, D) -> x (B, T, E).
extern "C" int Llama31Layer(int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *,
                            void *) {
  if (nparam != 18) return 1;
  LayerInputs in{};
  in.x = static_cast<const float *>(params[0]);
  in.turns = static_cast<const float *>(params[1]);
  in.positions = static_cast<const int32_t *>(params[2]);
  in.slots = static_cast<const int32_t *>(params[3]);
  in.tables = static_cast<const int32_t *>(params[4]);
  in.settings = static_cast<const float *>(params[5]);
  in.attention_norm = static_cast<const float *>(params[6]);
  in.wq = params[7], in.wk = params[8], in.wv = params[9], in.wo = params[10];
  in.ffn_norm = static_cast<const float *>(params[11]);
  in.w1 = params[12], in.w2 = params[13], in.w3 = params[14];
  in.keys = static_cast<float *>(params[15]);
  in.values = static_cast<float *>(params[16]);
  in.batch = shapes[0][0], in.tokens = shapes[0][1], in.dim = shapes[0][2];
  in.q_width = shapes[7][0], in.kv_width = shapes[8][0], in.ffn = shapes[12][0];
  in.kv_heads = shapes[15][1], in.width = shapes[15][2], in.table_length = shapes[4][1];
  float *out = static_cast<float *>(params[17]);
  if (IsBf16(dtypes[7])) {
    Layer<Bf16>(in, out).Run();
  } else {
    Layer<float>(in, out).Run();
  }
  return 0;
}

extern "C" std::vector<int64_t> Llama31LayerInferShape(int *ndims, int64_t **shapes, mindspore::AotExtra *) {
  return FirstShape(ndims, shapes);
}

// x (..., E), norm (E,), settings (2,) -> (..., E).
extern "C" int Llama31Norm(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  if (nparam != 4) return 1;
  const int64_t width = shapes[1][0], rows = Count(ndims[0] - 1, shapes[0]);
  const float *x = static_cast<const float *>(params[0]), *weight = static_cast<const float *>(params[1]);
  const float eps = static_cast<const float *>(params[2])[0];
  float *out = static_cast<float *>(params[3]);
  for (int64_t r = 0; r < rows; ++r) RmsNorm(x + r * width, weight, eps, width, out + r * width);
  return 0;
}

extern "C" std::vector<int64_t> Llama31NormInferShape(int *ndims, int64_t **shapes, mindspore::AotExtra *) {
  return FirstShape(ndims, shapes);
}

// x (..., E), weight (V, E) -> (..., V).
extern "C" int Llama31Linear(int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *,
                             void *) {
  if (nparam != 3) return 1;
  const int64_t n = shapes[1][0], k = shapes[1][1], rows = Count(ndims[0] - 1, shapes[0]);
  const float *x = static_cast<const float *>(params[0]);
  float *out = static_cast<float *>(params[2]);
  if (IsBf16(dtypes[1])) {
    Linear<Bf16>(x, params[1], rows, k, n, out);
  } else {
    Linear<float>(x, params[1], rows, k, n, out);
  }
  return 0;
}

extern "C" std::vector<int64_t> Llama31LinearInferShape(int *ndims, int64_t **shapes, mindspore::AotExtra *) {
  std::vector<int64_t> shape = FirstShape(ndims, shapes);
  shape.back() = shapes[1][0];
  return shape;
}

// positions (B, T), frequencies (D / 2,) -> cosines and sines (2, B, T, D / 2).
extern "C" int Llama31Rope(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  if (nparam != 3) return 1;
  const int32_t *positions = static_cast<const int32_t *>(params[0]);
  const float *frequencies = static_cast<const float *>(params[1]);
  float *out = static_cast<float *>(params[2]);
  const int64_t rows = Count(ndims[0], shapes[0]), half = shapes[1][0];
  ThreadPool::Get().For(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * half; i < end * half; ++i) {
      const float angle = static_cast<float>(positions[i / half]) * frequencies[i % half];
      out[i] = std::cos(angle);
      out[rows * half + i] = std::sin(angle);
    }
  });
  return 0;
}

extern "C" std::vector<int64_t> Llama31RopeInferShape(int *ndims, int64_t **shapes, mindspore::AotExtra *) {
  std::vector<int64_t> shape{2};
  shape.insert(shape.end(), shapes[0], shapes[0] + ndims[0]);
  shape.push_back(shapes[1][0]);
  return shape;
}

// ids (B, T), weight (V, E) -> (B, T, E) float32. Ids are checked by the engine.
extern "C" int Llama31Embedding(int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *,
                                void *) {
  if (nparam != 3) return 1;
  const int32_t *ids = static_cast<const int32_t *>(params[0]);
  float *out = static_cast<float *>(params[2]);
  const int64_t width = shapes[1][1], rows = Count(ndims[0], shapes[0]);
  for (int64_t r = 0; r < rows; ++r) {
    if (!IsBf16(dtypes[1])) {
      std::memcpy(out + r * width, static_cast<const float *>(params[1]) + ids[r] * width, width * sizeof(float));
      continue;
    }
    const uint16_t *from = static_cast<const uint16_t *>(params[1]) + ids[r] * width;
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(out + r * width + i, &bits, sizeof(bits));
    }
  }
  return 0;
}

extern "C" std::vector<int64_t> Llama31EmbeddingInferShape(int *ndims, int64_t **shapes, mindspore::AotExtra *) {
  std::vector<int64_t> shape = FirstShape(ndims, shapes);
  shape.push_back(shapes[1][1]);
  return shape;
}
