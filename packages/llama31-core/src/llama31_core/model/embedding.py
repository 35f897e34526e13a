"""The table of token vectors."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from llama31_core import kernels


class TokenEmbedding(nn.Cell):  # type: ignore[misc]
    """Token ids to vectors."""

    def __init__(self, vocab_size: int, dim: int, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.embedding_weight = Parameter(initializer(Normal(0.02), (vocab_size, dim), dtype))

    def construct(self, tokens: Tensor) -> Tensor:
        """Vectors of shape (..., dim) for ids of shape (...)."""
        return ops.gather(self.embedding_weight, tokens, 0)

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., dim) to logits (..., vocab_size): the table as the head of a tied model."""
        return kernels.linear(hidden, self.embedding_weight)
