"""One table of element types: what numpy, safetensors, MindSpore's `.ckpt` and our command line call each of them.

`dtype_of` finds an entry by word, name or numpy dtype; `cast` converts an array and refuses to make finite values inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llama31_core.errors import CheckpointError

Array = npt.NDArray[Any]
_LINE_BYTES = 64


@dataclass(frozen=True)
class DType:
    """An element type under all its names. `word` is the command line's, None for types no weight is stored in."""

    name: str
    safetensors: str
    mindspore: str
    numpy: np.dtype[Any]
    word: str | None = None

    @property
    def size_bytes(self) -> int:
        return int(self.numpy.itemsize)


DTYPES = (
    DType("float32", "F32", "Float32", np.dtype(np.float32), "fp32"),
    DType("bfloat16", "BF16", "BFloat16", np.dtype(ml_dtypes.bfloat16), "bf16"),
    DType("float16", "F16", "Float16", np.dtype(np.float16), "fp16"),
    DType("float64", "F64", "Float64", np.dtype(np.float64)),
    DType("int64", "I64", "Int64", np.dtype(np.int64)),
    DType("int32", "I32", "Int32", np.dtype(np.int32)),
    DType("int16", "I16", "Int16", np.dtype(np.int16)),
    DType("int8", "I8", "Int8", np.dtype(np.int8)),
    DType("uint64", "U64", "UInt64", np.dtype(np.uint64)),
    DType("uint32", "U32", "UInt32", np.dtype(np.uint32)),
    DType("uint16", "U16", "UInt16", np.dtype(np.uint16)),
    DType("uint8", "U8", "UInt8", np.dtype(np.uint8)),
    DType("bool", "BOOL", "Bool", np.dtype(np.bool_)),
)
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_MINDSPORE = {dtype.mindspore: dtype for dtype in DTYPES}
WEIGHT_DTYPES = tuple(dtype for dtype in DTYPES if dtype.word is not None)
_BY_WORD = {key: dtype for dtype in WEIGHT_DTYPES for key in (dtype.name, dtype.word)}
_BY_NUMPY = {dtype.numpy.name: dtype for dtype in DTYPES}  # by name: MindSpore has a bfloat16 of its own


def dtype_of(kind: str | np.dtype[Any]) -> DType:
    """The entry for a command-line word (`bf16`), a name (`bfloat16`) or a numpy dtype.

    Raises:
        CheckpointError: no such type, or a word that is not one of the three weight types.
    """
    if isinstance(kind, str):
        if kind not in _BY_WORD:
            allowed = ", ".join(str(dtype.word) for dtype in WEIGHT_DTYPES)
            raise CheckpointError(f"dtype {kind!r} is not known: allowed are {allowed}")
        return _BY_WORD[kind]
    if kind.name not in _BY_NUMPY:
        raise CheckpointError(f"arrays of numpy dtype {kind} cannot be stored in a checkpoint")
    return _BY_NUMPY[kind.name]


def cast(array: Array, dtype: DType, *, tensor: str) -> Array:
    """`array` as `dtype`, rounded to nearest even; the same object if it already is.

    Raises:
        CheckpointError: finite values of `tensor` are beyond the new type's range.
    """
    if array.dtype.name == dtype.numpy.name:
        return array.view(dtype.numpy)
    with np.errstate(over="ignore"):
        result = array.astype(dtype.numpy)
    narrower = dtype.numpy.kind == "f" and dtype.size_bytes < array.dtype.itemsize
    if narrower or dtype.name == "float16":
        lost = int(np.count_nonzero(np.isinf(result))) - int(np.count_nonzero(np.isinf(array)))
        if lost:
            raise CheckpointError(
                f"tensor {tensor!r} has {lost} finite values beyond the range of {dtype.name}; use bf16 or fp32"
            )
    return result


def array_of_lines(shape: Sequence[int], dtype: np.dtype[Any], *, zeros: bool = False) -> Array:
    """An array, without values or of zeros, that begins at a cache line: a load across two takes twice as long."""
    size = math.prod(shape) * dtype.itemsize
    buffer = (np.zeros if zeros else np.empty)(size + _LINE_BYTES, np.uint8)
    start = -buffer.ctypes.data % _LINE_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)
