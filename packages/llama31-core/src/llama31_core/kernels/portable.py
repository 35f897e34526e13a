"""The kernel interface in MindSpore operators that any device has: tensors in, tensors out, no state of its own.

Norms, rotations and softmax are computed in float32 and given in the type of their input; products in the input's type.

Shapes: B sequences, T new tokens of each, S cached tokens of each, M blocks of each, H query heads, K key-value heads,
D width of a head, C slots in the cache (one holds one token), O and I features out and in, G groups of I.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops

# Added to the score of a key that a query must not see. Finite, so that a row that sees nothing (a padding
# token) softmaxes to numbers and not to NaN.
_MASKED = -1e30

_matmul_tb = ops.MatMul(transpose_b=True)
_scores = ops.BatchMatMul(transpose_b=True)
_weighted_sum = ops.BatchMatMul()
_softmax = ops.Softmax(-1)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T` for x of shape (..., I), in the type of x."""
    out = _matmul_tb(x.reshape(-1, x.shape[-1]), weight_OI.astype(x.dtype))
    return out.reshape((*x.shape[:-1], -1))


def dequantize(qweight: Tensor, scales_OG: Tensor, biases_OG: Tensor, bits: int, group_size: int) -> Tensor:
    """Weights (O, I), float32, of a quantised matrix: `q * scale + bias` (checkpoint/quantized.py)."""
    numbers = qweight.astype(ms.float32)
    if bits == 4:
        high = ops.floor(numbers / 16)
        numbers = ops.stack((numbers - high * 16, high), -1).reshape(qweight.shape[0], -1)
    groups = (ops.arange(numbers.shape[1]) // group_size).astype(ms.int32)
    return numbers * ops.gather(scales_OG, groups, 1) + ops.gather(biases_OG, groups, 1)


def packed_dtype() -> ms.Type:
    """Of weights of 4 bits, two in a byte as checkpoints have them."""
    return ms.uint8


def quantized_linear(
    x: Tensor, qweight: Tensor, scales_OG: Tensor, biases_OG: Tensor, bits: int, group_size: int
) -> Tensor:
    """`linear` with a quantised weight of O rows."""
    return linear(x, dequantize(qweight, scales_OG, biases_OG, bits, group_size))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis (Zhang and Sennrich 2019, equation 4)."""
    exact = x.astype(ms.float32)
    normed = exact * ops.rsqrt(ops.square(exact).mean(-1, keep_dims=True) + eps)
    return (normed * weight.astype(ms.float32)).astype(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020, GLU variants)."""
    return gate * ops.sigmoid(gate) * up


def apply_rope(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head: the half-split layout of HF checkpoints."""
    exact = x_BTHD.astype(ms.float32)
    half = exact.shape[-1] // 2
    turned = ops.cat((-exact[..., half:], exact[..., :half]), axis=-1)
    return (exact * cos_BT1D + turned * sin_BT1D).astype(x_BTHD.dtype)


def _attend(q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, hidden_BTS: Tensor) -> Tensor:
    """Grouped-query attention; `hidden` is true where a query must not see a key. Gives (B, T, H * D)."""
    batch, tokens, heads, width = q_BTHD.shape
    kv_heads = k_BSKD.shape[2]
    group = heads // kv_heads
    q_BTHD = q_BTHD * (1.0 / math.sqrt(width))
    q_BKgD = q_BTHD.reshape(batch, tokens, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q_BKgD = q_BKgD.reshape(batch, kv_heads, -1, width)  # (B, K, G * T, D)
    k_BKSD = k_BSKD.transpose(0, 2, 1, 3)
    v_BKSD = v_BSKD.transpose(0, 2, 1, 3)
    scores = _scores(q_BKgD, k_BKSD).astype(ms.float32)  # (B, K, G * T, S)
    # Repeated to the whole shape: an addition that broadcasts keeps four times its result as tables on a CPU, and in
    # every layer its own. This one tensor is the same for all layers.
    scores = scores + ops.tile((hidden_BTS.astype(ms.float32) * _MASKED)[:, None], (1, kv_heads, group, 1))
    weights = _softmax(scores).astype(q_BTHD.dtype)
    out = _weighted_sum(weights, v_BKSD).reshape(batch, kv_heads, group, tokens, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * width)


def causal_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, segment_ids_BT: Tensor) -> Tensor:
    """Attention of whole sequences; a token sees itself and what stands before it in its own segment."""
    return _attend(q_BTHD, k_BTKD, v_BTKD, hidden_from(segment_ids_BT))


def hidden_from(segment_ids_BT: Tensor) -> Tensor:
    """Where a token (second axis) must not see another (third axis): it comes later, or is of another segment."""
    order = ops.arange(segment_ids_BT.shape[1])
    later_TT = order[None, :] > order[:, None]
    foreign_BTT = segment_ids_BT[:, None, :] != segment_ids_BT[:, :, None]
    return ops.logical_or(later_TT, foreign_BTT)


def cache_shape(num_blocks: int, block_size: int, kv_heads: int, width: int) -> tuple[int, ...]:
    """Of the cache of keys, and of that of values: (C, K, D).

    Blocks have no axis of their own, because a scatter of single tokens into one would copy the whole cache on a CPU.
    """
    return (num_blocks * block_size, kv_heads, width)


def write_cache(k_cache_CKD: Tensor, v_cache_CKD: Tensor, slots_BT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Store one key and one value per token at its slot (block * block_size + offset), in place.

    Gives a tensor that what reads the cache has to wait for.
    """
    _, kv_heads, width = k_cache_CKD.shape
    slots = slots_BT.reshape(-1)
    ops.scatter_update(k_cache_CKD, slots, k_BTKD.reshape(-1, kv_heads, width))
    ops.scatter_update(v_cache_CKD, slots, v_BTKD.reshape(-1, kv_heads, width))
    return slots


def paged_attention(
    q_BTHD: Tensor,
    k_cache_CKD: Tensor,
    v_cache_CKD: Tensor,
    block_tables_BM: Tensor,
    positions_BT: Tensor,
    block_size: int,
) -> Tensor:
    """Attention of new tokens over the cached blocks of their sequence (Kwon et al. 2023, PagedAttention).

    The keys and values of the new tokens are in the cache already. A token at position p sees positions 0 .. p.
    """
    batch = q_BTHD.shape[0]
    _, kv_heads, width = k_cache_CKD.shape
    offsets = ops.arange(block_size).astype(ms.int32)
    slots = (block_tables_BM[:, :, None] * block_size + offsets).reshape(-1)
    k_BSKD = ops.gather(k_cache_CKD, slots, 0).reshape(batch, -1, kv_heads, width)
    v_BSKD = ops.gather(v_cache_CKD, slots, 0).reshape(batch, -1, kv_heads, width)
    seen = ops.arange(k_BSKD.shape[1]).astype(ms.int32)
    return _attend(q_BTHD, k_BSKD, v_BSKD, seen[None, None, :] > positions_BT[:, :, None])
