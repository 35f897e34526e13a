"""Which class each kind of layer is: the model asks here for its parts, so that it holds no parallel code itself.

A tensor-parallel layout gives other layers of the same names; the model's own are whole.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn

from llama31_core.model.embedding import TokenEmbedding
from llama31_core.model.linear import Linear
from llama31_core.model.norm import RMSNorm


class Layers:
    """Layers that hold their whole weights.

    Args:
        param_dtype: of the matrices and the embedding; norms, which are small, are float32 in any case.
    """

    def __init__(self, param_dtype: ms.Type = ms.float32) -> None:
        self.param_dtype = param_dtype

    def linear(self, name: str, in_features: int, out_features: int) -> nn.Cell:
        """A projection; `name` says which, as the layout table does: `attention.wq`, `feed_forward.w2`, `lm_head`."""
        return Linear(in_features, out_features, self.param_dtype)

    def embedding(self, vocab_size: int, dim: int) -> nn.Cell:
        """Token ids (..., T) to vectors (..., T, dim)."""
        return TokenEmbedding(vocab_size, dim, self.param_dtype)

    def norm(self, dim: int, eps: float) -> nn.Cell:
        """A norm over the last axis."""
        return RMSNorm(dim, eps)
