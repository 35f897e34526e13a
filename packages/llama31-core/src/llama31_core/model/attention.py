"""Grouped-query attention; the way keys and values are kept is a part that is chosen when the model is built.

Shapes: B sequences, T tokens of each, H query heads, K key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from llama31_core import kernels
from llama31_core.config import ModelConfig
from llama31_core.model.layers import Layers


class CausalAttention(nn.Cell):  # type: ignore[misc]
    """Attention within whole sequences and no cache: what training uses. Context: segment_ids (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self._attend = kernels.active().causal_attention

    def construct(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions_BT: Tensor, segment_ids_BT: Tensor
    ) -> Tensor:
        """Mixed values of shape (B, T, H * D)."""
        return self._attend(q_BTHD, k_BTKD, v_BTKD, segment_ids_BT)


class PagedAttention(nn.Cell):  # type: ignore[misc]
    """Attention over a paged cache that this cell owns: what inference uses.

    Context: slots (B, T), where each new token's key and value go, and block_tables (B, M), the blocks of each
    sequence in their order. The cache's shape is the kernels' matter; its first axis goes block by block.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.block_size = block_size
        chosen = kernels.active()
        self._write, self._attend = chosen.write_cache, chosen.paged_attention
        shape = chosen.cache_shape(num_blocks, block_size, config.n_kv_heads, config.head_dim)
        self.k_cache = Parameter(initializer("zeros", shape, dtype), requires_grad=False)
        self.v_cache = Parameter(initializer("zeros", shape, dtype), requires_grad=False)

    def construct(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        positions_BT: Tensor,
        slots_BT: Tensor,
        block_tables_BM: Tensor,
    ) -> Tensor:
        """Mixed values of shape (B, T, H * D)."""
        written = self._write(self.k_cache, self.v_cache, slots_BT, k_BTKD, v_BTKD)
        q_BTHD = ops.depend(q_BTHD, written)
        return self._attend(q_BTHD, self.k_cache, self.v_cache, block_tables_BM, positions_BT, self.block_size)


# Builds one layer's way of attending; called once per layer.
AttentionCore = Callable[[], nn.Cell]


class Attention(nn.Cell):  # type: ignore[misc]
    """Projections, rotary embedding, attention and output projection (Ainslie et al. 2023, GQA)."""

    def __init__(self, config: ModelConfig, core: AttentionCore, layers: Layers) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = layers.linear("attention.wq", config.dim, config.n_heads * config.head_dim)
        self.wk = layers.linear("attention.wk", config.dim, config.n_kv_heads * config.head_dim)
        self.wv = layers.linear("attention.wv", config.dim, config.n_kv_heads * config.head_dim)
        self.wo = layers.linear("attention.wo", config.n_heads * config.head_dim, config.dim)
        self.core = core()
        self._turn = kernels.active().apply_rope

    def construct(
        self, x_BTE: Tensor, positions_BT: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor, *context: Tensor
    ) -> Tensor:
        """What every token gathers from the tokens it sees, shape (B, T, dim)."""
        heads = (*positions_BT.shape, -1, self.head_dim)
        q_BTHD = self._turn(self.wq(x_BTE).reshape(heads), cos_BT1D, sin_BT1D)
        k_BTKD = self._turn(self.wk(x_BTE).reshape(heads), cos_BT1D, sin_BT1D)
        v_BTKD = self.wv(x_BTE).reshape(heads)
        return self.wo(self.core(q_BTHD, k_BTKD, v_BTKD, positions_BT, *context))
