"""A matrix with no bias: the only kind of projection in Llama."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer

from llama31_core import kernels


class Linear(nn.Cell):  # type: ignore[misc]
    """`x @ weight.T`, weight of shape (out_features, in_features) as checkpoints hold it."""

    def __init__(self, in_features: int, out_features: int, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.weight = Parameter(initializer(Normal(0.02), (out_features, in_features), dtype))
        self._multiply = kernels.linear

    def construct(self, x: Tensor) -> Tensor:
        """Map x of shape (..., in_features) to (..., out_features)."""
        return self._multiply(x, self.weight)
