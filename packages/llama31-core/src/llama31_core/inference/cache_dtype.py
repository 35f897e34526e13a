"""Which number type keys and values have: what is asked for, and what computes over which weights, in; a type out."""

from __future__ import annotations

from typing import Literal, get_args

from llama31_core.errors import ConfigError
from llama31_core.precision import DtypeName, Precision

KvCacheDtype = Literal["auto", "float32", "bfloat16"]


def check_name(asked: str) -> None:
    """Refuse what is no `KvCacheDtype`.

    Raises:
        ConfigError: that.
    """
    if asked not in get_args(KvCacheDtype):
        raise ConfigError(f"kv_cache_dtype is {asked!r}, allowed are {', '.join(map(repr, get_args(KvCacheDtype)))}")


def cpu_cache_dtype(asked: KvCacheDtype, *, has_small_weights: bool, why_portable: str | None) -> DtypeName | None:
    """`Precision.cache` on a CPU. With "auto" the native kernels keep bfloat16 beside weights that are no larger.

    Args:
        asked: of the options.
        has_small_weights: they are in bfloat16, or quantised.
        why_portable: why the portable kernels compute, in one sentence; None if the native ones do.

    Raises:
        ConfigError: bfloat16 is asked for and the portable kernels compute.
    """
    if why_portable is None:
        return "bfloat16" if asked == "bfloat16" or (asked == "auto" and has_small_weights) else None
    if asked == "bfloat16":
        raise ConfigError(
            "kv_cache_dtype is 'bfloat16', allowed with the portable kernels of a CPU are 'auto' and 'float32': "
            f"MindSpore's operators write no bfloat16 there ({why_portable})"
        )
    return None


def check_ascend(asked: KvCacheDtype, precision: Precision) -> None:
    """On Ascend the cache has the type that is computed in, whose name may be said.

    Raises:
        ConfigError: another one is.
    """
    if asked not in ("auto", precision.compute):
        raise ConfigError(
            f"kv_cache_dtype is {asked!r}, allowed with products in {precision.compute} on Ascend is 'auto': its "
            "attention operators take keys and values in the type of the queries"
        )
