"""MindSpore's `.ckpt` layout: a file in, its tensors' positions out; a tensor's bytes in, protobuf messages out.

The file is one protobuf message (`checkpoint.proto` of MindSpore), and so a sequence of
`value { tag, tensor { dims, tensor_type, tensor_content } }` fields; a big tensor is several values in a row with one
tag. Only these few fields are decoded, so that contents are skipped over and not loaded: a protobuf library would read
the whole file. A trailing `crc_num` + 10 bytes may hold a CRC-32 of everything before it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

from llama31_core.checkpoint.dtypes import BY_MINDSPORE, DType
from llama31_core.checkpoint.stored import MAX_DIMS, OpenFile, StoredTensor, is_shape
from llama31_core.errors import CheckpointError

_CRC_MARK, _CRC_BYTES = b"crc_num", 17
_WINDOW_BYTES = 4096
_MAX_TEXT_BYTES = 4096
# Protobuf keys: field number * 8 + wire type (0 varint, 2 length-delimited).
_VALUE, _TAG, _TENSOR, _MAP_TENSOR = 0x0A, 0x0A, 0x12, 0x1A
_DIM, _PACKED_DIMS, _TYPE, _CONTENT = 0x08, 0x0A, 0x12, 0x1A


class _Cursor:
    """Decodes protobuf primitives from a byte range of a file through a small window."""

    def __init__(self, file: OpenFile, start: int, end: int) -> None:
        self.file, self.position, self.end = file, start, end
        self._window, self._window_start = b"", 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path} is not a whole MindSpore .ckpt: at byte {self.position} {what}; "
            "it is truncated, encrypted or another format"
        )

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.text(1, limit=1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise self.fail("a number is longer than 10 bytes")

    def length(self) -> int:
        size = self.varint()
        if size > self.end - self.position:
            raise self.fail(f"a field of {size} bytes is announced where {self.end - self.position} are left")
        return size

    def text(self, size: int, *, limit: int = _MAX_TEXT_BYTES) -> bytes:
        if size > min(limit, self.end - self.position):
            raise self.fail(f"{size} bytes are announced, at most {min(limit, self.end - self.position)} can follow")
        offset = self.position - self._window_start
        if not 0 <= offset <= len(self._window) - size:
            room = min(_WINDOW_BYTES, self.end - self.position)
            self._window, self._window_start = self.file.read(self.position, max(size, room)), self.position
            offset = 0
        self.position += size
        return self._window[offset : offset + size]


@dataclass
class _Value:
    """One decoded `value` message."""

    tag: str = ""
    dims: list[int] = field(default_factory=list)
    type_name: str = ""
    content: tuple[int, int] | None = None


def is_ckpt(file: OpenFile) -> bool:
    """Whether the file starts like a MindSpore `.ckpt`: a value, and in it a tag."""
    if file.size_bytes < 4:
        return False
    start = file.read(0, min(12, file.size_bytes))
    if start[0] != _VALUE:
        return False
    after = next((i + 1 for i in range(1, len(start)) if start[i] < 0x80), len(start))
    return after < len(start) and start[after] == _TAG


def parse_ckpt(file: OpenFile) -> dict[str, StoredTensor]:
    """The tensors of a `.ckpt` file; entries of type `str` are no tensors and left out.

    Raises:
        CheckpointError: truncated, not protobuf, an unknown type, a duplicate tag, or content that does not fill dims.
    """
    tensors: dict[str, StoredTensor] = {}
    open_value: _Value | None = None
    segments: list[tuple[int, int]] = []
    cursor = _Cursor(file, 0, _content_end(file))
    while cursor.position < cursor.end:
        value = _read_value(cursor)
        if open_value is not None and value.tag == open_value.tag:
            if (value.dims, value.type_name) != (open_value.dims, open_value.type_name):
                raise CheckpointError(f"{file.path}: the pieces of tensor {value.tag!r} have different dims or types")
        else:
            _add_tensor(file, tensors, open_value, segments)
            open_value, segments = value, []
        assert value.content is not None
        segments.append(value.content)
    _add_tensor(file, tensors, open_value, segments)
    return tensors


def _content_end(file: OpenFile) -> int:
    """Where the protobuf ends: before the CRC, if there is one."""
    if file.size_bytes < _CRC_BYTES:
        return file.size_bytes
    tail = file.read(file.size_bytes - _CRC_BYTES, len(_CRC_MARK))
    return file.size_bytes - (_CRC_BYTES if tail == _CRC_MARK else 0)


def _read_value(cursor: _Cursor) -> _Value:
    if cursor.varint() != _VALUE:
        raise cursor.fail("no value field begins")
    size = cursor.length()
    inner = _Cursor(cursor.file, cursor.position, cursor.position + size)
    value = _Value()
    while inner.position < inner.end:
        key = inner.varint()
        if key == _TAG:
            value.tag = _decode(inner, inner.text(inner.length()))
        elif key == _TENSOR:
            _read_tensor(inner, value)
        elif key == _MAP_TENSOR:
            raise CheckpointError(f"{cursor.file.path}: {value.tag!r} is a MapParameter; Llama checkpoints have none")
        else:
            raise inner.fail(f"an unknown field with key {key} begins")
    if not value.tag or not value.type_name or value.content is None:
        raise cursor.fail("a value lacks its tag, type or content")
    cursor.position += size
    return value


def _read_tensor(outer: _Cursor, value: _Value) -> None:
    size = outer.length()
    inner = _Cursor(outer.file, outer.position, outer.position + size)
    while inner.position < inner.end:
        key = inner.varint()
        if key == _DIM:
            value.dims.append(inner.varint())
        elif key == _PACKED_DIMS:
            packed_size = inner.length()
            packed_end = inner.position + packed_size
            while inner.position < packed_end and len(value.dims) <= MAX_DIMS:
                value.dims.append(inner.varint())
        elif key == _TYPE:
            value.type_name = _decode(inner, inner.text(inner.length(), limit=64))
        elif key == _CONTENT:
            content_size = inner.length()
            value.content = (inner.position, content_size)
            inner.position += content_size
        else:
            raise inner.fail(f"an unknown tensor field with key {key} begins")
        if not is_shape(value.dims):
            raise inner.fail("a tensor has impossible dims")
    outer.position += size


def _decode(cursor: _Cursor, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise cursor.fail("a name is not UTF-8") from error


def _add_tensor(
    file: OpenFile, tensors: dict[str, StoredTensor], value: _Value | None, segments: list[tuple[int, int]]
) -> None:
    if value is None or value.type_name == "str":
        return
    if value.tag in tensors:
        raise CheckpointError(f"{file.path}: tensor {value.tag!r} is there twice")
    dtype = BY_MINDSPORE.get(value.type_name)
    if dtype is None:
        allowed = ", ".join(BY_MINDSPORE)
        raise CheckpointError(f"{file.path}: tensor {value.tag!r} has type {value.type_name!r}, allowed are {allowed}")
    size = sum(count for _, count in segments)
    # MindSpore writes the dims of a scalar as [0].
    shape = () if value.dims == [0] and size == dtype.size_bytes else tuple(value.dims)
    if size != math.prod(shape) * dtype.size_bytes:
        raise CheckpointError(
            f"{file.path}: tensor {value.tag!r} of shape {shape} in {dtype.name} has {size} bytes of content, "
            f"expected {math.prod(shape) * dtype.size_bytes}"
        )
    tensors[value.tag] = StoredTensor(file.path, shape, dtype, tuple(segments))


def check_crc(file: OpenFile) -> bool | None:
    """Whether the file's CRC-32 is right; None if it carries none."""
    end = _content_end(file)
    if end == file.size_bytes:
        return None
    expected = int.from_bytes(file.read(file.size_bytes - 10, 10), "big")
    crc, position = 0, 0
    while position < end:
        chunk = file.read(position, min(1 << 24, end - position))
        crc = zlib.crc32(chunk, crc)
        position += len(chunk)
    return crc == expected


def build_value_start(name: str, dtype: DType, shape: tuple[int, ...], content_size: int) -> bytes:
    """The bytes before `content_size` bytes of content of one `value`."""
    dims = b"".join(b"\x08" + encode_varint(dim) for dim in (shape or (0,)))
    kind = dtype.mindspore.encode()
    head = dims + b"\x12" + encode_varint(len(kind)) + kind + b"\x1a" + encode_varint(content_size)
    tag = name.encode()
    tensor_size = len(head) + content_size
    start = b"\x0a" + encode_varint(len(tag)) + tag + b"\x12" + encode_varint(tensor_size)
    return b"\x0a" + encode_varint(len(start) + tensor_size) + start + head


def encode_varint(value: int) -> bytes:
    """A number in protobuf's variable length."""
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
