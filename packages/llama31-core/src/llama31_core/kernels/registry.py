"""Which set of kernels a model is built with: that of the device, or one that is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import mindspore as ms
from mindspore import Tensor

from llama31_core.errors import ConfigError
from llama31_core.kernels import ascend, portable, products


class KernelSet(Protocol):
    """What a set has. Shapes are explained in portable.py, whose functions are the definition of each."""

    def packed_dtype(self) -> ms.Type: ...

    def quantized_linear(
        self, x: Tensor, qweight: Tensor, scales_OG: Tensor, biases_OG: Tensor, bits: int, group_size: int, /
    ) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, /) -> Tensor: ...

    def swiglu(self, gate: Tensor, up: Tensor, /) -> Tensor: ...

    def apply_rope(self, x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor, /) -> Tensor: ...

    def causal_attention(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, segment_ids_BT: Tensor, /) -> Tensor: ...

    def cache_shape(self, num_blocks: int, block_size: int, kv_heads: int, width: int, /) -> tuple[int, ...]: ...

    def write_cache(
        self, k_cache: Tensor, v_cache: Tensor, slots_BT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, /
    ) -> Tensor: ...

    def paged_attention(
        self,
        q_BTHD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables_BM: Tensor,
        positions_BT: Tensor,
        block_size: int,
        /,
    ) -> Tensor: ...


SETS: dict[str, KernelSet] = {"portable": portable, "products": products, "ascend": ascend}
_OF_DEVICE = {"Ascend": "ascend"}  # every other device has the portable ones

_named: ContextVar[str | None] = ContextVar("kernels", default=None)


def active() -> KernelSet:
    """The set that `use` names, or that of the device which MindSpore is set to."""
    return SETS[_named.get() or _OF_DEVICE.get(ms.get_context("device_target"), "portable")]


@contextmanager
def use(name: str) -> Iterator[KernelSet]:
    """Build models with the set of this name, whatever the device.

    Raises:
        ConfigError: there is no such set.
    """
    if name not in SETS:
        raise ConfigError(f"kernels are {name!r}, allowed are {', '.join(map(repr, SETS))}")
    token = _named.set(name)
    try:
        yield SETS[name]
    finally:
        _named.reset(token)
