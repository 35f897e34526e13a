// The native model with a clock between its phases, for tools/bench/phases.py: the same code in the same order.

#include <chrono>
#include <cstdint>

#include "arguments.h"

using namespace llama31;

namespace {

// The names are in phases.py.
enum Phase { kEmbedding, kNorms, kHeads, kRotation, kAttention, kOut, kGateUp, kDown, kHead };

// Gives the time since it was last asked to a phase.
class Clock {
 public:
  explicit Clock(double *seconds) : seconds_(seconds) {}

  void Add(Phase phase) {
    const auto now = std::chrono::steady_clock::now();
    seconds_[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  double *seconds_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

template <typename Matrix>
struct TimedLayer : Layer<Matrix> {
  using Layer<Matrix>::Layer;

  void Run(Clock &clock) {
    const Shapes &in = this->in_;
    const LayerWeights &weights = this->weights_;
    this->Norm(weights.attention_norm), clock.Add(kNorms);
    this->ProjectHeads(), clock.Add(kHeads);
    this->TurnAndStore(), clock.Add(kRotation);
    this->AttendAll(), clock.Add(kAttention);
    this->Take(this->mixed_, in.q_width, in.q_width);
    this->ProjectAndAdd(weights.wo, in.q_width), clock.Add(kOut);
    this->Norm(weights.ffn_norm), clock.Add(kNorms);
    this->Gate(), clock.Add(kGateUp);
    this->Take(this->gated_, 2 * in.ffn, in.ffn);
    this->ProjectAndAdd(weights.w2, in.ffn), clock.Add(kDown);
  }
};

template <typename Matrix, typename Table>
struct TimedModel : Model<Matrix, Table> {
  using Base = Model<Matrix, Table>;
  using Base::Base;

  void Run(float *logits, Clock &clock) {
    const ModelInputs &in = this->in_;
    float *x = Base::template Buffer<0>(this->rows_ * in.shapes.dim);
    float *turns = Base::template Buffer<1>(this->rows_ * in.shapes.width);
    this->Embed(x), clock.Add(kEmbedding);
    this->Turn(turns), clock.Add(kRotation);
    const Step step{turns, in.positions, in.slots, in.tables, in.settings};
    for (const LayerWeights &weights : in.layers) TimedLayer<Matrix>(in.shapes, step, weights, x).Run(clock);
    this->Head(x, logits), clock.Add(kHead);
  }
};

}  // namespace

extern "C" void Llama31SetNumThreads(int count) { ThreadPool::num_threads = count; }

// The arguments of arguments.h; adds to the seconds of each phase.
extern "C" int Llama31Phases(int nparam, void **params, int64_t **shapes, const char **dtypes, double *seconds) {
  return WithModel(nparam, params, shapes, dtypes, [&](const ModelInputs &in, auto kinds, float *logits) {
    using Kinds = decltype(kinds);
    Clock clock(seconds);
    TimedModel<typename Kinds::Matrix, typename Kinds::Table>(in).Run(logits, clock);
  });
}

// The same without clocks: seconds of the whole.
extern "C" int Llama31Whole(int nparam, void **params, int64_t **shapes, const char **dtypes, double *seconds) {
  return WithModel(nparam, params, shapes, dtypes, [&](const ModelInputs &in, auto kinds, float *logits) {
    using Kinds = decltype(kinds);
    Clock clock(seconds);
    Model<typename Kinds::Matrix, typename Kinds::Table>(in).Run(logits);
    clock.Add(kEmbedding);
  });
}
