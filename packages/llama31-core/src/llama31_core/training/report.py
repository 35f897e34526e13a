"""What a step of training did, and its line in the log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """What one step did; `loss` is that before the update, `grad_norm` that before clipping."""

    epoch: int
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    step_time_s: float
    num_tokens: int
    num_label_tokens: int
    is_overflow: bool = False

    def __str__(self) -> str:
        return (
            f"epoch: {self.epoch}, step: [{self.step}/{self.num_steps}], loss: {self.loss:.4f}, "
            f"lr: {self.learning_rate:.3e}, overflow: {self.is_overflow}, global_norm: {self.grad_norm:.3f}, "
            f"per_step_time: {self.step_time_s * 1e3:.0f}ms, {self.num_tokens / self.step_time_s:.0f} tokens/s, "
            f"{self.num_label_tokens} label tokens"
        )
