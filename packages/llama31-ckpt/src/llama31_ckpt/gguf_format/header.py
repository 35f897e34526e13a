"""The header of a GGUF file: a path in, metadata and tensor positions out (ggml `docs/gguf.md`).

The gguf library's own reader believes the counts it finds: an array that claims 2**60 entries keeps it busy for ever.
Here every count and length is checked against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llama31_ckpt.gguf_format import MAGIC
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.errors import CheckpointError

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_WINDOW_BYTES = 1 << 20
_MIN_STRING_BYTES, _MIN_PAIR_BYTES, _MIN_TENSOR_BYTES = 8, 13, 24
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape in numpy's order, ggml type and position in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.size_bytes // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(file: OpenFile) -> GgufHeader:
    """Parse and check the header.

    Raises:
        CheckpointError: no GGUF, truncated, or a count, length, type or offset that cannot be true.
    """
    cursor = _Cursor(file)
    if file.size_bytes < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{file.path} is not a GGUF file")
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise CheckpointError(f"{file.path} is GGUF version {version}, allowed are 2 and 3 (little endian)")
    num_tensors = cursor.count(_MIN_TENSOR_BYTES, "tensors")
    num_pairs = cursor.count(_MIN_PAIR_BYTES, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} comes twice")
        metadata[key] = cursor.value()
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise CheckpointError(f"{file.path}: general.alignment is {alignment!r}, expected a size in bytes")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(file.path, metadata, _place_tensors(file, infos, data_start))


class _Cursor:
    """Reads little-endian values one after the other, within the file's bounds."""

    def __init__(self, file: OpenFile) -> None:
        self.file, self.position = file, 0
        self._window, self._window_start = b"", 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: at byte {self.position} {what}; the GGUF file is damaged")

    def take(self, size: int) -> bytes:
        left = self.file.size_bytes - self.position
        if size > left:
            raise self.fail(f"{size} bytes are announced and {left} are left")
        offset = self.position - self._window_start
        if not 0 <= offset <= len(self._window) - size:
            self._window = self.file.read(self.position, max(size, min(_WINDOW_BYTES, left)))
            self._window_start, offset = self.position, 0
        self.position += size
        return self._window[offset : offset + size]

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, item_bytes: int, what: str) -> int:
        count: int = self.scalar("<Q")
        left = self.file.size_bytes - self.position
        if count > left // item_bytes:
            raise self.fail(f"{count} {what} are announced, {left} bytes are left")
        return count

    def string(self) -> str:
        try:
            return self.take(self.count(1, "bytes of text")).decode()
        except UnicodeDecodeError as error:
            raise self.fail("a text is not UTF-8") from error

    def value(self) -> Any:
        kind = self._kind()
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        item = self._kind()
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(self.count(_MIN_STRING_BYTES, "texts"))]
        if item == GGUFValueType.ARRAY:
            raise self.fail("an array of arrays begins, which this reader does not know")
        layout = _SCALARS[item]
        size = struct.calcsize(layout)
        count = self.count(size, "values")
        return list(struct.unpack(f"<{count}{layout[1]}", self.take(count * size)))

    def _kind(self) -> GGUFValueType:
        number = self.scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.fail(f"a value of unknown type {number} begins") from error


_Info = tuple[str, tuple[int, ...], GGMLQuantizationType, int]


def _read_tensor_info(cursor: _Cursor) -> _Info:
    name = cursor.string()
    num_dims = cursor.scalar("<I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {num_dims} dimensions, allowed are 1 to {_MAX_DIMS}")
    dims = [cursor.scalar("<Q") for _ in range(num_dims)]
    number, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise cursor.fail(f"tensor {name!r} has unknown ggml type {number}") from error
    if min(dims) < 1 or max(dims) >= 2**40:
        raise cursor.fail(f"tensor {name!r} has dimensions {dims}")
    return name, tuple(reversed(dims)), kind, offset


def _place_tensors(file: OpenFile, infos: list[_Info], data_start: int) -> dict[str, GgufTensor]:
    """Positions in the file, checked to lie in it and not to overlap."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has rows of {shape[-1]}, {kind.name} needs blocks of {block}"
            )
        size = math.prod(shape) // block * block_bytes
        if data_start + offset + size > file.size_bytes:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} ends at byte {data_start + offset + size}, the file at "
                f"{file.size_bytes}; it is truncated or its header lies"
            )
        if name in tensors:
            raise CheckpointError(f"{file.path}: tensor {name!r} is there twice")
        tensors[name] = GgufTensor(shape, kind, data_start + offset, size)
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise CheckpointError(f"{file.path}: tensors {before!r} and {name!r} overlap")
        end, before = tensor.offset + tensor.size_bytes, name
    return tensors
