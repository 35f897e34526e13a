"""One training step: micro-batches in; loss, gradient norm and changed weights out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import IGNORED_LABEL, Batch
from llama31_core.training.loss_scale import LossScale
from llama31_core.training.optim import AdamW
from llama31_core.training.reduction import OneProcess, Reduction


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the labels of all micro-batches of all ranks, before the update; `grad_norm` is global
    and before clipping; `is_overflow`: the gradients were no numbers, and nothing was changed."""

    loss: float
    grad_norm: float
    num_label_tokens: int
    is_overflow: bool


class TrainStep:
    """Accumulates gradients over micro-batches, clips and updates.

    The loss is divided by the labels of the whole step before anything is differentiated, so that every label weighs
    the same whatever micro-batch or rank it is in.

    Args:
        max_norm: gradients are scaled down so that their global norm is at most this; None leaves them.
        loss_scale: factor of the loss during differentiation.
        reduction: sums over ranks.
    """

    def __init__(
        self,
        backprop: Backprop,
        optimizer: AdamW,
        *,
        max_norm: float | None,
        loss_scale: LossScale | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self._backprop = backprop
        self._optimizer = optimizer
        self._max_norm = math.inf if max_norm is None else max_norm
        self.loss_scale = loss_scale or LossScale()
        self._reduction = reduction or OneProcess()

    def __call__(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Take a step; a step without a label changes nothing and has loss 0."""
        own = sum(int(np.count_nonzero(batch.labels != IGNORED_LABEL)) for batch in micro_batches)
        num_labels = round(self._reduction.sum_number(float(own)))
        if not num_labels:
            return StepResult(0.0, 0.0, 0, is_overflow=False)
        factor = self.loss_scale.value / num_labels
        self._backprop.clear()
        total = self._backprop.accumulate(micro_batches, factor)
        loss = self._reduction.sum_number(total) / num_labels
        gradients = self._reduction.sum_gradients(self._backprop.gradients)
        squares = self._reduction.sum_squares(self._optimizer.square_sum(gradients))
        norm = math.sqrt(squares) / self.loss_scale.value if math.isfinite(squares) else math.inf
        is_overflow = not math.isfinite(norm)
        if not is_overflow and math.isfinite(loss):
            clip = min(1.0, self._max_norm / (norm + 1e-6))
            self._optimizer.step(gradients, learning_rate, clip / self.loss_scale.value)
        self.loss_scale.update(is_overflow=is_overflow)
        return StepResult(loss, norm, num_labels, is_overflow)
