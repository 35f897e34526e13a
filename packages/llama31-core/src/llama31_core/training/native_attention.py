"""Attention for training by the native CPU kernels: a tile of queries over the keys that it sees.

Scores never leave a core's cache, and keys of other documents or later tokens are not computed at all.
`BlockwiseAttention` does the same by MindSpore's operators where the kernels cannot run, and is their oracle.

Shapes: B sequences, T tokens, H query heads, K key-value heads, D width of a head, E = H * D.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn

from llama31_core.config import ModelConfig
from llama31_core.inference.runner import native_kernels_here
from llama31_core.kernels.native.operator import native_operator
from llama31_core.model.attention import AttentionCore
from llama31_core.precision import Precision
from llama31_core.training.attention import BlockwiseAttention, FusedAttention

_WIDTH = 16  # numbers in a vector
_FLOAT32 = Precision()


def attention_core(config: ModelConfig, precision: Precision = _FLOAT32) -> AttentionCore:
    """How training attends on this machine."""
    if ms.get_context("device_target") == "Ascend":
        return FusedAttention
    fits = precision == _FLOAT32 and config.head_dim % _WIDTH == 0 and native_kernels_here()
    return NativeAttention if fits else BlockwiseAttention


def document_starts(segment_ids_BT: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The first token that each token sees, (B, T): where its run of equal ids begins."""
    batch, tokens = segment_ids_BT.shape
    begins = np.ones((batch, tokens), bool)
    begins[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return np.maximum.accumulate(np.where(begins, np.arange(tokens, dtype=np.int32), np.int32(0)), axis=1)


class NativeAttention(nn.Cell):  # type: ignore[misc]
    """Grouped-query attention in float32. Context: `document_starts`."""

    def __init__(self) -> None:
        super().__init__()
        qkv_starts = [ms.float32] * 3 + [ms.int32]
        self._attend = native_operator(
            "Llama31TrainAttention",
            qkv_starts,
            1,
            out_shape=lambda q, k, v, starts: (q[0], q[1], q[2] * q[3]),
            out_dtype=lambda q, k, v, starts: q,
        )
        self._differentiate = native_operator(
            "Llama31TrainAttentionGrad",
            [*qkv_starts, ms.float32, ms.float32],
            3,
            out_shape=lambda q, k, v, starts, out, d_out: (q, k, v),
            out_dtype=lambda q, k, v, starts, out, d_out: (q, k, v),
        )

    @staticmethod
    def context(segment_ids_BT: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        """What follows the positions in a call."""
        return [document_starts(segment_ids_BT)]

    def construct(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions_BT: Tensor, starts_BT: Tensor
    ) -> Tensor:
        """Mixed values (B, T, E)."""
        return self._attend(q_BTHD, k_BTKD, v_BTKD, starts_BT)

    def gradients(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        out_BTE: Tensor,
        d_out_BTE: Tensor,
        positions_BT: Tensor,
        starts_BT: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given the output and its gradient."""
        return self._differentiate(q_BTHD, k_BTKD, v_BTKD, starts_BT, out_BTE, d_out_BTE)  # type: ignore[no-any-return]
