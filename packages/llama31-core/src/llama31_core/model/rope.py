"""Rotary position embedding: positions in, the cosines and sines that turn queries and keys out."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llama31_core.config import ModelConfig
from llama31_core.rope_frequencies import inverse_frequencies


class RotaryEmbedding(nn.Cell):  # type: ignore[misc]
    """Positions (B, T) to cosines and sines of shape (B, T, 1, head_dim), computed once per forward pass.

    Angles are float32 products, so that position 131,071 is as exact as in the reference implementations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies = inverse_frequencies(config)
        self.frequencies_D = Tensor(np.concatenate([frequencies, frequencies]), ms.float32)

    def construct(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for every position."""
        angles = positions_BT.astype(ms.float32)[:, :, None, None] * self.frequencies_D
        return ops.cos(angles), ops.sin(angles)
