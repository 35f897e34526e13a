// What training computes natively, as MindSpore custom operators; float32 throughout.

#include <cstdint>

#include "training_attention.h"
#include "training_products.h"
#include "training_rows.h"

using namespace llama31;

namespace {

const float *Floats(const void *data) { return static_cast<const float *>(data); }

TrainingAttention AttentionOf(void **params, int64_t **shapes) {
  return {Floats(params[0]), Floats(params[1]), Floats(params[2]), static_cast<const int32_t *>(params[3]),
          shapes[0][0], shapes[0][1], shapes[0][2], shapes[1][2], shapes[0][3]};
}

float *Out(void *data) { return static_cast<float *>(data); }

int64_t Count(int dimensions, const int64_t *shape) {
  int64_t count = 1;
  for (int i = 0; i < dimensions; ++i) count *= shape[i];
  return count;
}

// x (..., E), weight (E), eps (1).
TrainingNorm NormOf(void **params, const int *ndims, int64_t **shapes) {
  const int64_t width = shapes[1][0];
  return {Floats(params[0]), Floats(params[1]), *Floats(params[2]), Count(ndims[0], shapes[0]) / width, width};
}

int Turn(int nparam, void **params, int64_t **shapes, bool is_back) {
  if (nparam != 4) return 1;
  const int64_t *shape = shapes[0];
  TrainingTurn(Floats(params[0]), Floats(params[1]), Floats(params[2]), shape[0] * shape[1], shape[2], shape[3], is_back,
               Out(params[3]));
  return 0;
}

}  // namespace

// q (B, T, H, D), k, v (B, T, K, D), starts (B, T) -> out (B, T, H * D).
extern "C" int Llama31TrainAttention(int nparam, void **params, int *, int64_t **shapes, const char **, void *, void *) {
  if (nparam != 5) return 1;
  AttentionOf(params, shapes).Forward(static_cast<float *>(params[4]));
  return 0;
}

// q, k, v, starts as above, out and its gradient (B, T, H * D) -> gradients of q, k and v.
extern "C" int Llama31TrainAttentionGrad(int nparam, void **params, int *, int64_t **shapes, const char **, void *,
                                         void *) {
  if (nparam != 9) return 1;
  AttentionOf(params, shapes)
      .Backward(Floats(params[4]), Floats(params[5]), static_cast<float *>(params[6]), static_cast<float *>(params[7]),
                static_cast<float *>(params[8]));
  return 0;
}

// x (..., E), weight (E), eps (1) -> x / rms(x) * weight.
extern "C" int Llama31TrainNorm(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  if (nparam != 4) return 1;
  NormOf(params, ndims, shapes).Forward(Out(params[3]));
  return 0;
}

// The same and the result's gradient -> those of x and weight.
extern "C" int Llama31TrainNormGrad(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *,
                                    void *) {
  if (nparam != 6) return 1;
  NormOf(params, ndims, shapes).Backward(Floats(params[3]), Out(params[4]), Out(params[5]));
  return 0;
}

// gate, up -> silu(gate) * up.
extern "C" int Llama31TrainSwiGlu(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *,
                                  void *) {
  if (nparam != 3) return 1;
  TrainingSwiGlu(Floats(params[0]), Floats(params[1]), Count(ndims[0], shapes[0]), Out(params[2]));
  return 0;
}

// gate, up and the result's gradient -> those of gate and up.
extern "C" int Llama31TrainSwiGluGrad(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *,
                                      void *) {
  if (nparam != 5) return 1;
  TrainingSwiGluGradient(Floats(params[0]), Floats(params[1]), Floats(params[2]), Count(ndims[0], shapes[0]),
                         Out(params[3]), Out(params[4]));
  return 0;
}

// x (B, T, H, D), cosines and sines (B, T, 1, D) -> x turned.
extern "C" int Llama31TrainTurn(int nparam, void **params, int *, int64_t **shapes, const char **, void *, void *) {
  return Turn(nparam, params, shapes, false);
}

// The same -> x turned back, which is how a gradient of what was turned goes.
extern "C" int Llama31TrainTurnBack(int nparam, void **params, int *, int64_t **shapes, const char **, void *, void *) {
  return Turn(nparam, params, shapes, true);
}

// logits (C, V), labels (C) -> losses (C) and their gradients (C, V).
extern "C" int Llama31TrainCrossEntropy(int nparam, void **params, int *, int64_t **shapes, const char **, void *,
                                        void *) {
  if (nparam != 4) return 1;
  CrossEntropy(Floats(params[0]), static_cast<const int32_t *>(params[1]), shapes[0][0], shapes[0][1], Out(params[2]),
               Out(params[3]));
  return 0;
}

// Where oneDNN's dnnl_sgemm is. Before the first product.
extern "C" void Llama31SetSgemm(void *function) { Product::sgemm = reinterpret_cast<Product::Sgemm>(function); }

// x (..., K), weight (N, K) -> x weight^T (..., N).
extern "C" int Llama31TrainLinear(int nparam, void **params, int *ndims, int64_t **shapes, const char **, void *,
                                  void *) {
  if (nparam != 3) return 1;
  const int64_t rows = Count(ndims[0] - 1, shapes[0]), n = shapes[1][0], k = shapes[1][1];
  return Product{false, true, rows, n, k}.Run(Floats(params[0]), Floats(params[1]), Out(params[2]));
}

// Gradient of the result (..., N), weight (N, K) -> that of x (..., K).
extern "C" int Llama31TrainLinearInputGrad(int nparam, void **params, int *ndims, int64_t **shapes, const char **,
                                           void *, void *) {
  if (nparam != 3) return 1;
  const int64_t rows = Count(ndims[0] - 1, shapes[0]), n = shapes[1][0], k = shapes[1][1];
  return Product{false, false, rows, k, n}.Run(Floats(params[0]), Floats(params[1]), Out(params[2]));
}

// Gradient of the result (..., N), x (..., K) -> that of the weight (N, K).
extern "C" int Llama31TrainLinearWeightGrad(int nparam, void **params, int *ndims, int64_t **shapes, const char **,
                                            void *, void *) {
  if (nparam != 3) return 1;
  const int64_t rows = Count(ndims[0] - 1, shapes[0]), n = shapes[0][ndims[0] - 1], k = shapes[1][ndims[1] - 1];
  return Product{true, false, n, k, rows}.Run(Floats(params[0]), Floats(params[1]), Out(params[2]));
}
