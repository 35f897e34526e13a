"""The kernel interface in the fused operators of Ascend NPUs, float16 or bfloat16. Not run on hardware.

Each call is checked on a CPU: through MindSpore's own inference of types and shapes, and against `portable` by running
it over operators that follow their documentation, written in NumPy (both in tests/test_kernels_ascend*.py).

Shapes: see portable.py; N = B * T tokens, P = tokens of a block.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import (
    FlashAttentionScore,
    PagedAttention,
    ReshapeAndCache,
    RmsNorm,
    RotaryPositionEmbedding,
    Swiglu,
    WeightQuantBatchMatmul,
)

from llama31_core.kernels.portable import hidden_from

_ANY_DISTANCE = 2**31 - 1  # FlashAttentionScore's "as many tokens back as there are"
_FULL_MASK = 0  # its sparse_mode of a mask of all queries and keys
_HALF_SPLIT = 0  # RotaryPositionEmbedding's mode that turns the pairs (i, i + D/2)
# Added by PagedAttention to the scores of keys that a query must not see; in range of float16.
_MASKED = -10000.0

_swiglu = Swiglu()
_rotate = RotaryPositionEmbedding()
_reshape_and_cache = ReshapeAndCache()


def packed_dtype() -> ms.Type:
    """Of weights of 4 bits: two a byte, -8 to 7, where checkpoints have 0 to 15 (inference/values.py takes 8 off)."""
    return ms.qint4x2


def quantized_linear(
    x: Tensor, qweight: Tensor, scales_OG: Tensor, biases_OG: Tensor, bits: int, group_size: int
) -> Tensor:
    """WeightQuantBatchMatmul, whose weight is `(q + offset) * scale`; offsets are small, exact in 16 bits if whole."""
    offsets_OG = biases_OG / scales_OG + (8 if bits == 4 else 0)
    multiply = WeightQuantBatchMatmul(False, True, group_size)
    out = multiply(
        x.reshape(-1, x.shape[-1]), qweight, scales_OG.astype(x.dtype), offsets_OG.astype(x.dtype), None, None, None
    )
    return out.reshape((*x.shape[:-1], -1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RmsNorm; it sums in float32 whatever it is given."""
    return RmsNorm(eps)(x, weight.astype(x.dtype))[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Swiglu, which takes both halves as one tensor."""
    return _swiglu(ops.cat((gate, up), -1), -1)


def apply_rope(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """RotaryPositionEmbedding in float32: a bfloat16 cosine has 8 bits, too few for far positions."""
    turned = _rotate(x_BTHD.astype(ms.float32), cos_BT1D, sin_BT1D, _HALF_SPLIT)
    return turned.astype(x_BTHD.dtype)


def causal_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, segment_ids_BT: Tensor) -> Tensor:
    """FlashAttentionScore over whole sequences, with gradients; packed ones are told apart by the mask."""
    batch, tokens, heads, width = q_BTHD.shape
    attend = FlashAttentionScore(heads, 1.0, 1.0 / math.sqrt(width), _ANY_DISTANCE, 0, 0, "BSND", _FULL_MASK)
    hidden_B1TT = hidden_from(segment_ids_BT)[:, None].astype(ms.uint8)
    out_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, None, None, None, hidden_B1TT, None, None, None)[3]
    return out_BTHD.reshape(batch, tokens, heads * width)


def cache_shape(num_blocks: int, block_size: int, kv_heads: int, width: int) -> tuple[int, ...]:
    """Of the cache of keys, and of that of values."""
    return (num_blocks, block_size, kv_heads, width)


def write_cache(k_cache: Tensor, v_cache: Tensor, slots_BT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """ReshapeAndCache: one key and one value per token to its slot of caches (blocks, P, K, D), in place."""
    slots = slots_BT.reshape(-1)
    kv_width = k_BTKD.shape[2] * k_BTKD.shape[3]
    return _reshape_and_cache(k_BTKD.reshape(-1, kv_width), v_BTKD.reshape(-1, kv_width), k_cache, v_cache, slots)


def paged_attention(
    q_BTHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_BM: Tensor,
    positions_BT: Tensor,
    block_size: int,
) -> Tensor:
    """PagedAttention of one new token (decode) or several (a chunk of a prompt) of each sequence over its blocks."""
    batch, tokens, heads, width = q_BTHD.shape
    attend = PagedAttention(heads, 1.0 / math.sqrt(width), k_cache.shape[2])
    cached = ops.arange(block_tables_BM.shape[1] * block_size).astype(ms.int32)
    hidden_NS = cached[None, :] > positions_BT.reshape(-1, 1)
    context_lens_B = positions_BT.max(axis=1) + 1
    query_lens_B = ops.zeros_like(context_lens_B) + tokens
    out = attend(
        q_BTHD.reshape(-1, heads * width),
        k_cache,
        v_cache,
        block_tables_BM,
        context_lens_B,
        None,
        None,
        hidden_NS.astype(q_BTHD.dtype) * _MASKED,
        query_lens_B,
        None,
    )
    return out.reshape(batch, tokens, heads * width)
