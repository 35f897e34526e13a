"""What a run tells of itself: a report a step and one an evaluation, each a line in the log and a row of metrics."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: mean over the labels of the step, before the update.
        grad_norm: global, before clipping.
        step_time_s: from the data's arrival to the changed weights.
        num_tokens, num_label_tokens: of this device's sequences, padding too; of all devices' labels.
        flops: floating-point operations that the step needs on this device; what is computed again is not counted.
        peak_flops_per_s: what this device reached in a large matrix product.
        memory_bytes: the most that was in use until now.
        eta_s: time to the last step, at the pace of the latest ones.
        is_overflow: the gradients were no numbers, and nothing was changed.
    """

    epoch: int
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    step_time_s: float
    num_tokens: int
    num_label_tokens: int
    flops: float
    peak_flops_per_s: float
    memory_bytes: int
    eta_s: float
    loss_scale: float
    is_overflow: bool = False

    @property
    def tokens_per_s(self) -> float:
        """Of this device."""
        return self.num_tokens / self.step_time_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), of the rate of a large matrix product."""
        return self.flops / self.step_time_s / self.peak_flops_per_s

    def metrics(self) -> dict[str, Any]:
        """All figures by name."""
        derived = {"tokens_per_s": self.tokens_per_s, "flops_per_s": self.flops / self.step_time_s, "mfu": self.mfu}
        return asdict(self) | derived

    def __str__(self) -> str:
        return (
            f"epoch: {self.epoch}, step: [{self.step}/{self.num_steps}], loss: {self.loss:.4f}, "
            f"lr: {self.learning_rate:.3e}, overflow: {self.is_overflow}, loss_scale: {self.loss_scale:g}, "
            f"global_norm: {self.grad_norm:.3f}, per_step_time: {self.step_time_s * 1e3:.0f}ms, "
            f"{self.tokens_per_s:.0f} tokens/s/device, {self.num_label_tokens} label tokens, "
            f"{self.flops / self.step_time_s / 1e12:.3f} TFLOP/s, MFU {self.mfu:.1%}, "
            f"memory {self.memory_bytes / 1e9:.2f} GB, ETA {timedelta(seconds=round(self.eta_s))}"
        )


def perplexity(loss: float) -> float:
    """exp(loss), or the greatest number that there is."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class EvalReport:
    """Held-out data after `step` steps.

    Attributes:
        loss: cross-entropy, mean over all labels of the data.
        is_best: lower than after all steps before.
        samples: token ids of the completions of the sample prompts.
    """

    step: int
    num_steps: int
    loss: float
    num_label_tokens: int
    elapsed_s: float
    is_best: bool = False
    samples: tuple[tuple[int, ...], ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def metrics(self) -> dict[str, Any]:
        """The figures by name."""
        names = ("step", "num_steps", "num_label_tokens", "elapsed_s", "is_best")
        figures = {name: getattr(self, name) for name in names}
        return figures | {"eval_loss": self.loss, "perplexity": self.perplexity}

    def __str__(self) -> str:
        return (
            f"evaluation after step [{self.step}/{self.num_steps}]: loss: {self.loss:.4f}, perplexity: "
            f"{self.perplexity:.3f} over {self.num_label_tokens} label tokens in {self.elapsed_s:.1f} s"
            f"{', the best so far' if self.is_best else ''}"
        )


class Observer(Protocol):
    """Is told what a run does."""

    def on_step(self, report: StepReport) -> None:
        """After every step."""

    def on_evaluation(self, report: EvalReport) -> None:
        """After every evaluation."""
