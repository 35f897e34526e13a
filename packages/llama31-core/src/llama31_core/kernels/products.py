"""The portable kernels with sums and broadcasts written as matrix products, which is what a CPU does fastest.

A row sum in MindSpore on a CPU takes about ten times as long as the product with a column of ones, and a product with a
broadcast operand four times as long as one of equal shapes; so it is in the gradients, too, which follow from these
forms. Everything else is the portable set. Shapes as there.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from llama31_core.kernels.portable import (
    cache_shape,
    causal_attention,
    packed_dtype,
    paged_attention,
    quantized_linear,
    swiglu,
    write_cache,
)

__all__ = [
    "apply_rope",
    "cache_shape",
    "causal_attention",
    "packed_dtype",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "swiglu",
    "write_cache",
]

_matmul = ops.MatMul()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis: `x * (1 / rms) weight^T`, the factor an outer product."""
    width = x.shape[-1]
    rows = x.astype(ms.float32).reshape(-1, width)
    mean_square = _matmul(rows * rows, ops.ones((width, 1), ms.float32)) * (1.0 / width)
    factors = _matmul(ops.rsqrt(mean_square + eps), weight.astype(ms.float32).reshape(1, -1))
    return (rows * factors).reshape(x.shape).astype(x.dtype)


def apply_rope(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head; swapping them with a sign is a product with a fixed matrix."""
    heads, width = x_BTHD.shape[2], x_BTHD.shape[3]
    half = width // 2
    one, zero = ops.eye(half, half, ms.float32), ops.zeros((half, half), ms.float32)
    swap = ops.cat((ops.cat((zero, one), 1), ops.cat((-one, zero), 1)), 0)
    exact = x_BTHD.astype(ms.float32)
    turned = _matmul(exact.reshape(-1, width), swap).reshape(x_BTHD.shape)
    cos_BTHD, sin_BTHD = ops.cat((cos_BT1D,) * heads, 2), ops.cat((sin_BT1D,) * heads, 2)
    return (exact * cos_BTHD + turned * sin_BTHD).astype(x_BTHD.dtype)
