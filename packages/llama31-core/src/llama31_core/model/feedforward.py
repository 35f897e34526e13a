"""The SwiGLU feed-forward."""

from __future__ import annotations

from mindspore import Tensor, nn

from llama31_core import kernels
from llama31_core.config import ModelConfig
from llama31_core.model.linear import Linear


class FeedForward(nn.Cell):  # type: ignore[misc]
    """`w2(silu(w1 x) * w3 x)` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def construct(self, x: Tensor) -> Tensor:
        """Map x of shape (..., dim) to the same shape."""
        return self.w2(kernels.swiglu(self.w1(x), self.w3(x)))
