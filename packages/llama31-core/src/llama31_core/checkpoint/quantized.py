"""Weights of 8 or 4 bits: a matrix in, whole numbers with a scale and a bias for each group of columns out, and back.

`weight = q * scale + bias`. A scale is a bfloat16 number. A bias is a small whole number of scales, so that zero stays
zero; with 4 bits it is the group's least weight, in 128ths of a scale, if the weights lie on a grid from there, as
those of Q4_1 files do. So both go into 32 bits for the native kernels. NPUs hold biases in 16 bits, as numbers of
scales: whole ones exactly, the others within 1/32 of a scale. In place of a
matrix `NAME.weight` of shape (N, K) a quantised checkpoint has three tensors (G = K / group_size rounded up; the last
group may be shorter):

    NAME.qweight   (N, K) int8, or (N, K / 2) uint8 with two columns a byte, the even one in the low half
    NAME.scales    (N, G) float32
    NAME.biases    (N, G) float32

Norms stay as they are. Embedding and head have 8 bits in either case: they bear 4 worst.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.shapes import Shape, check_weights, parameter_shapes, report_differences
from llama31_core.config import ModelConfig, Quantization
from llama31_core.errors import CheckpointError

_LOWEST = {8: -128, 4: 0}
BIAS_PARTS = np.float32(128)  # of a scale, whole numbers of which a bias is
QWEIGHT, SCALES, BIASES = "qweight", "scales", "biases"


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (N, K) of few bits.

    Attributes:
        qweight: (N, K) int8 or (N, K / 2) uint8.
        scales, biases: (N, G) float32.
        bits: 8 or 4.
        group_size: columns that share a scale and a bias.
    """

    qweight: Array
    scales: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    bits: int
    group_size: int

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weights (N, K)."""
        numbers = unpack(self.qweight) if self.bits == 4 else self.qweight
        columns = np.arange(numbers.shape[1]) // self.group_size
        weights: npt.NDArray[np.float32] = numbers.astype(np.float32)
        weights *= self.scales[:, columns]
        weights += self.biases[:, columns]
        return weights

    def parts(self) -> dict[str, Array]:
        """Its tensors by the last part of their names."""
        return {QWEIGHT: self.qweight, SCALES: self.scales, BIASES: self.biases}


# How many times smaller the squared error has to be where zero does not stay zero. Columns with large inputs may have
# weights near zero, and pay: by the error alone, groups of 128 raised SmolLM2's perplexity by 47%, not 33%.
_FREE_COUNTS = 4


def _ranges(weights: npt.NDArray[np.float32], bits: int) -> Iterator[tuple[Array, Array, int]]:
    """Scales and biases (N,) that one group (N, C) can have, and what their squared error counts.

    The numbers span the group's weights and zero.
    """
    low, high = np.minimum(weights.min(axis=1), 0), np.maximum(weights.max(axis=1), 0)
    scales = ((high - low) / np.float32(2**bits - 1)).astype(np.float32)
    scales = ((scales.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)  # up to a bfloat16
    scales = np.where(scales > 0, scales, np.float32(1))
    yield scales, -(np.rint(-low / scales) + np.float32(_LOWEST[bits])) * scales, 1
    if bits == 4:
        yield scales, np.rint(low * BIAS_PARTS / scales) * scales / BIAS_PARTS, _FREE_COUNTS


def choose_ranges(
    weights: npt.NDArray[np.float32],
    bits: int,
    group_size: int,
    importance: npt.NDArray[np.float32] | None = None,
    shrinks: Sequence[float] = (1,),
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales and biases (N, G) of a matrix (N, K), of each group those with the least squared error.

    Args:
        weights: the matrix.
        bits, group_size: as in `QuantizedMatrix`.
        importance: (K,), what the squared error of a column counts; all the same if None.
        shrinks: what parts of a group's range are tried; what is outside of it is cut off.
    """
    importance = np.ones(weights.shape[1], np.float32) if importance is None else importance
    scales, biases = (np.empty((len(weights), num_groups(weights.shape[1], group_size)), np.float32) for _ in range(2))
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        own, least = weights[:, columns], np.full(len(weights), np.inf, np.float32)
        choices = [choice for shrink in shrinks for choice in _ranges(own * np.float32(shrink), bits)]
        scales[:, group], biases[:, group], _ = choices[0]
        if len(choices) == 1:
            continue
        for scale, bias, counts in choices:
            back = _nearest(own, scale[:, None], bias[:, None], bits) * scale[:, None] + bias[:, None]
            error = counts * ((back - own) ** 2 @ importance[columns])
            better = error < least
            least[better] = error[better]
            scales[better, group], biases[better, group] = scale[better], bias[better]
    return scales, biases


def _nearest(weights: Array, scales: Array, biases: Array, bits: int) -> Array:
    lowest = _LOWEST[bits]
    return np.clip(np.rint((weights - biases) / scales), lowest, lowest + 2**bits - 1)


def round_to_numbers(weights: Array, scales: Array, biases: Array, bits: int) -> npt.NDArray[np.int32]:
    """The number whose weight is nearest, for weights (N, C) that have these scales and biases (N, 1)."""
    return _nearest(weights, scales, biases, bits).astype(np.int32)


def from_numbers(
    numbers: npt.NDArray[np.int32], scales: Array, biases: Array, bits: int, group: int
) -> QuantizedMatrix:
    """The matrix of numbers (N, K), scales and biases (N, G)."""
    stored = pack(numbers.astype(np.uint8)) if bits == 4 else numbers.astype(np.int8)
    return QuantizedMatrix(stored, scales.astype(np.float32), biases.astype(np.float32), bits, group)


def quantize(weights: npt.NDArray[np.float32], bits: int, group_size: int) -> QuantizedMatrix:
    """A matrix (N, K), each weight rounded to the nearest that its group can have."""
    scales, biases = choose_ranges(weights, bits, group_size)
    numbers = np.empty(weights.shape, np.int32)
    for group in range(scales.shape[1]):
        columns, own = np.s_[:, group * group_size : (group + 1) * group_size], np.s_[:, group : group + 1]
        numbers[columns] = round_to_numbers(weights[columns], scales[own], biases[own], bits)
    return from_numbers(numbers, scales, biases, bits, group_size)


def num_groups(columns: int, group_size: int) -> int:
    """Of a row."""
    return math.ceil(columns / group_size)


def pack(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(N, K) of 0 to 15 as (N, K / 2)."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << np.uint8(4))


def unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(N, K / 2) as (N, K) of 0 to 15."""
    numbers: npt.NDArray[np.uint8] = np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1)
    return numbers.reshape(len(packed), -1)


def bits_of(name: str, quantization: Quantization) -> int:
    """Bits of the matrix with this canonical name."""
    return 8 if name in (EMBEDDING, LM_HEAD) else quantization.bits


def part_name(name: str, part: str) -> str:
    """What a part of the matrix with this canonical name is called."""
    return f"{name.rpartition('.')[0]}.{part}"


def stored_shapes(config: ModelConfig) -> dict[str, tuple[Shape, str]]:
    """Shape and type name of every tensor of a quantised checkpoint; norms may be of any weight type ("")."""
    assert config.quantization is not None
    shapes: dict[str, tuple[Shape, str]] = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            shapes[name] = (shape, "")
            continue
        bits = bits_of(name, config.quantization)
        rows, columns = shape
        groups = (rows, num_groups(columns, config.quantization.group_size))
        packed = ((rows, columns // 2), "uint8") if bits == 4 else ((rows, columns), "int8")
        shapes[part_name(name, QWEIGHT)] = packed
        shapes[part_name(name, SCALES)] = shapes[part_name(name, BIASES)] = (groups, "float32")
    return shapes


def stored_bytes(config: ModelConfig) -> int:
    """Of all tensors of a quantised checkpoint, with norms in float32."""
    sizes = {"uint8": 1, "int8": 1}
    return sum(math.prod(shape) * sizes.get(dtype, 4) for shape, dtype in stored_shapes(config).values())


def packed_range_bytes(config: ModelConfig) -> int:
    """Of scales and biases as the native kernels hold them beside: 32 bits for each group."""
    shapes = stored_shapes(config)
    return sum(4 * math.prod(shape) for name, (shape, _) in shapes.items() if name.endswith(f".{SCALES}"))


def check_stored(weights: Weights, config: ModelConfig) -> None:
    """Check that `weights` has exactly the tensors of `config`, quantised or not.

    Raises:
        CheckpointError: names, shapes or types differ.
    """
    if config.quantization is None:
        check_weights(weights, config)
        return
    expected = stored_shapes(config)
    found = {name: weights.shape(name) for name in weights.names()}
    report_differences(str(weights.source), found, {name: shape for name, (shape, _) in expected.items()})
    for name, (_, dtype) in expected.items():
        if dtype and weights.dtype(name) != dtype:
            raise CheckpointError(f"{weights.source}: {name} is {weights.dtype(name)}, expected {dtype}")


class DequantizedWeights:
    """A quantised checkpoint as if its matrices were float32 ones."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        check_stored(weights, config)
        assert config.quantization is not None
        self._weights, self._quantization = weights, config.quantization
        self._shapes = parameter_shapes(config)

    @property
    def source(self) -> Path:
        return self._weights.source

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "float32" if len(self._shapes[name]) == 2 else self._weights.dtype(name)

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        if len(self._shapes[name]) == 1:
            return self._weights.read_slice(name, index)
        rows, *columns = index if index else (slice(None),)
        qweight, scales, biases = (
            self._weights.read_slice(part_name(name, part), (rows,)) for part in (QWEIGHT, SCALES, BIASES)
        )
        bits, group_size = bits_of(name, self._quantization), self._quantization.group_size
        whole = QuantizedMatrix(qweight, scales, biases, bits, group_size).dequantize()
        return whole[:, columns[0]] if columns else whole
