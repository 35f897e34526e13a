// What training computes natively, as MindSpore custom operators; float32 throughout.

#include <cstdint>

#include "training_attention.h"

using namespace llama31;

namespace {

const float *Floats(const void *data) { return static_cast<const float *>(data); }

TrainingAttention AttentionOf(void **params, int64_t **shapes) {
  return {Floats(params[0]), Floats(params[1]), Floats(params[2]), static_cast<const int32_t *>(params[3]),
          shapes[0][0], shapes[0][1], shapes[0][2], shapes[1][2], shapes[0][3]};
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
