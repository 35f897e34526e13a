"""The SwiGLU feed-forward."""

from __future__ import annotations

from mindspore import Tensor, nn

from llama31_core import kernels
from llama31_core.config import ModelConfig
from llama31_core.model.layers import Layers


class FeedForward(nn.Cell):  # type: ignore[misc]
    """`w2(silu(w1 x) * w3 x)` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.w1 = layers.linear("feed_forward.w1", config.dim, config.ffn_dim)
        self.w2 = layers.linear("feed_forward.w2", config.ffn_dim, config.dim)
        self.w3 = layers.linear("feed_forward.w3", config.dim, config.ffn_dim)
        self._swiglu = kernels.active().swiglu

    def construct(self, x: Tensor) -> Tensor:
        """Map x of shape (..., dim) to the same shape."""
        return self.w2(self._swiglu(self.w1(x), self.w3(x)))
