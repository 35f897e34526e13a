"""Causal attention of whole sequences for training: queries block by block, each block over the keys up to its end.

So the half of the scores that causality hides is not computed, and no more than one block of them exists at a time. The
gradients compute the scores again (Dao et al. 2022, FlashAttention, section 3.1) rather than keep them.

Shapes: B sequences, T tokens, H query heads, K key-value heads, D width of a head, G = H / K, C queries of a block,
S = keys up to the end of that block.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn, ops

from llama31_core.model import CausalAttention
from llama31_core.training.masks import bias
from llama31_core.training.pieces import query_blocks


def attention_biases(segment_ids_BT: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
    """What is added to the scores of each block of queries, (B, C, S). Computed once a batch, for all layers."""
    blocks = query_blocks(segment_ids_BT.shape[1])
    return [bias(segment_ids_BT, np.arange(start, stop), np.arange(stop)) for start, stop in blocks]


class FusedAttention(CausalAttention):
    """Grouped-query attention as one operator of the device, which has gradients of its own. Context: segment ids."""

    @staticmethod
    def context(segment_ids_BT: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        """What follows the positions in a call."""
        return [segment_ids_BT]


class BlockwiseAttention(nn.Cell):  # type: ignore[misc]
    """Grouped-query attention. Context: the biases of `attention_biases`, one after another.

    Sums over keys are products with ones, and a bias is spread over heads by a product with ones: see
    kernels/products.py.
    """

    def __init__(self) -> None:
        super().__init__()
        self._product = ops.BatchMatMul()
        self._product_tb = ops.BatchMatMul(transpose_b=True)
        self._product_ta = ops.BatchMatMul(transpose_a=True)
        self._softmax = ops.Softmax(-1)

    @staticmethod
    def context(segment_ids_BT: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
        """What follows the positions in a call."""
        return attention_biases(segment_ids_BT)

    def construct(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions_BT: Tensor, *biases_BCS: Tensor
    ) -> Tensor:
        """Mixed values of shape (B, T, H * D)."""
        batch, tokens, heads, width = q_BTHD.shape
        q_BHTD = self._by_head(q_BTHD) * (1.0 / math.sqrt(width))
        k_BKTD, v_BKTD = self._by_head(k_BTKD), self._by_head(v_BTKD)
        outputs: tuple[Tensor, ...] = ()
        start = 0
        for bias_BCS in biases_BCS:
            stop = bias_BCS.shape[2]
            p_BKgS = self._weights(q_BHTD[:, :, start:stop], k_BKTD[:, :, :stop], bias_BCS)
            mixed = self._product(p_BKgS, v_BKTD[:, :, :stop])
            outputs += (mixed.reshape(batch, heads, stop - start, width),)
            start = stop
        return self._by_head(ops.cat(outputs, 2)).reshape(batch, tokens, heads * width)

    def gradients(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        out_BTE: Tensor,
        d_out_BTE: Tensor,
        positions_BT: Tensor,
        *biases_BCS: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given the output and its gradient (E = H * D).

        dS = P * (dO V^T - rowsum(dO * O)), where the subtraction is one more column in the product.
        """
        batch, tokens, heads, width = q_BTHD.shape
        kv_heads = k_BTKD.shape[2]
        scale = 1.0 / math.sqrt(width)
        q_BHTD = self._by_head(q_BTHD) * scale
        k_BKTD, v_BKTD = self._by_head(k_BTKD), self._by_head(v_BTKD)
        d_out_BHTD = self._by_head(d_out_BTE.reshape(q_BTHD.shape))
        sums = ops.matmul((out_BTE * d_out_BTE).reshape(-1, width), ops.ones((width, 1), q_BTHD.dtype))
        sums_BHT1 = self._by_head(sums.reshape(batch, tokens, heads, 1))
        d_out_wide = ops.cat((d_out_BHTD, -sums_BHT1), -1)
        v_wide = ops.cat((v_BKTD, ops.ones((batch, kv_heads, tokens, 1), v_BTKD.dtype)), -1)
        dqs: tuple[Tensor, ...] = ()
        dks: tuple[Tensor, ...] = ()
        dvs: tuple[Tensor, ...] = ()
        start = 0
        for bias_BCS in biases_BCS:
            stop = bias_BCS.shape[2]
            grouped = (batch, kv_heads, -1, width)
            q_block = q_BHTD[:, :, start:stop]
            p_BKgS = self._weights(q_block, k_BKTD[:, :, :stop], bias_BCS)
            d_wide = d_out_wide[:, :, start:stop].reshape(batch, kv_heads, -1, width + 1)
            ds_BKgS = p_BKgS * self._product_tb(d_wide, v_wide[:, :, :stop])
            dq = self._product(ds_BKgS, k_BKTD[:, :, :stop])
            dqs += (dq.reshape(batch, heads, stop - start, width),)
            dk = self._product_ta(ds_BKgS, q_block.reshape(grouped))
            dv = self._product_ta(p_BKgS, d_out_BHTD[:, :, start:stop].reshape(grouped))
            dks += (self._padded(dk, tokens),)
            dvs += (self._padded(dv, tokens),)
            start = stop
        dq_BTHD = self._by_head(ops.cat(dqs, 2)) * scale
        return dq_BTHD, self._by_head(ops.addn(dks)), self._by_head(ops.addn(dvs))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, T, H, D) to (B, H, T, D) and back."""
        return x.transpose(0, 2, 1, 3)

    def _weights(self, q_BHCD: Tensor, k_BKSD: Tensor, bias_BCS: Tensor) -> Tensor:
        """Softmax of the scores, (B, K, G * C, S)."""
        batch, heads, block, width = q_BHCD.shape
        shape = (batch, k_BKSD.shape[1], heads // k_BKSD.shape[1] * block, k_BKSD.shape[2])
        scores = self._product_tb(q_BHCD.reshape(batch, k_BKSD.shape[1], -1, width), k_BKSD)
        spread = self._product(ops.ones((batch, heads, 1), ms.float32), bias_BCS.reshape(batch, 1, -1))
        return self._softmax(scores.astype(ms.float32) + spread.reshape(shape)).astype(q_BHCD.dtype)

    def _padded(self, x_BKSD: Tensor, tokens: int) -> Tensor:
        """With zeros for the keys behind the block."""
        batch, kv_heads, keys, width = x_BKSD.shape
        if keys == tokens:
            return x_BKSD
        return ops.cat((x_BKSD, ops.zeros((batch, kv_heads, tokens - keys, width), x_BKSD.dtype)), 2)
