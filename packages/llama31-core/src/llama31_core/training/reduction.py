"""What a step needs from the other ranks of a run; on one process, nothing."""

from __future__ import annotations

from typing import Protocol

from mindspore import Tensor


class Reduction(Protocol):
    """Sums over ranks. A parallel layout brings its own."""

    def sum_number(self, value: float) -> float:
        """Over ranks that have different data: label counts and losses."""

    def sum_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Over ranks that have the same weights and different data; once a step, after the last micro-batch."""

    def sum_squares(self, value: float) -> float:
        """Over ranks that have different weights."""


class OneProcess:
    """A run of one rank."""

    def sum_number(self, value: float) -> float:
        return value

    def sum_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients

    def sum_squares(self, value: float) -> float:
        return value
