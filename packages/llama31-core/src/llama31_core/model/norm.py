"""Root mean square layer norm."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer

from llama31_core import kernels


class RMSNorm(nn.Cell):  # type: ignore[misc]
    """`x / rms(x) * weight` over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self._normalise = kernels.active().rms_norm
        self.weight = Parameter(initializer("ones", (dim,), ms.float32))

    def construct(self, x: Tensor) -> Tensor:
        """Normalise x of shape (..., dim)."""
        return self._normalise(x, self.weight, self.eps)
