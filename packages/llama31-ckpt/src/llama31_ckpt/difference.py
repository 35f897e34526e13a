"""How far two checkpoints are apart: two sources of any format in, the greatest difference of each tensor out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llama31_ckpt.reading import read_rows
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.reader import Weights


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in both checkpoints.

    Attributes:
        name: canonical name.
        max_difference: greatest |a - b|; inf where just one is NaN, or the shapes differ.
        max_value: greatest |a|, for scale.
        num_differing: elements that differ in value.
        note: what else differs.
    """

    name: str
    max_difference: float
    max_value: float
    num_differing: int
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """The report of `diff`."""

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]

    def within(self, tolerance: float) -> bool:
        """Whether both have the same tensors and none differs by more than `tolerance`."""
        one_sided = self.only_in_a or self.only_in_b
        return not one_sided and all(tensor.max_difference <= tolerance for tensor in self.tensors)


def compare_weights(a: Weights, b: Weights, on_bytes: Callable[[int], object]) -> Difference:
    """Compare all tensors by value, whatever their dtypes."""
    names_a, names_b = a.names(), set(b.names())
    return Difference(
        tuple(name for name in names_a if name not in names_b),
        tuple(name for name in b.names() if name not in set(names_a)),
        tuple(_compare(a, b, name, on_bytes) for name in names_a if name in names_b),
    )


def _compare(a: Weights, b: Weights, name: str, on_bytes: Callable[[int], object]) -> TensorDifference:
    shape_a, shape_b = a.shape(name), b.shape(name)
    if shape_a != shape_b:
        return TensorDifference(name, float("inf"), 0.0, 0, f"shapes {shape_a} and {shape_b}")
    difference = value = 0.0
    differing = 0
    for part_a, part_b in zip(read_rows(a, name), read_rows(b, name), strict=True):
        largest, count = _difference(part_a, part_b)
        difference, differing = max(difference, largest), differing + count
        value = max(value, float(np.nanmax(np.abs(part_a.astype(np.float32, copy=False)), initial=0.0)))
        on_bytes(part_a.nbytes)
    dtypes = (a.dtype(name), b.dtype(name))
    return TensorDifference(name, difference, value, differing, "" if dtypes[0] == dtypes[1] else " and ".join(dtypes))


def _difference(a: Array, b: Array) -> tuple[float, int]:
    """Greatest difference and number of differing elements; NaN equals NaN."""
    wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    left, right = a.astype(wide, copy=False), b.astype(wide, copy=False)
    differing = (left != right) & ~(np.isnan(left) & np.isnan(right))
    count = int(np.count_nonzero(differing))
    if not count:
        return 0.0, 0
    gaps = np.abs(left[differing] - right[differing])
    return float("inf") if np.isnan(gaps).any() else float(gaps.max()), count
