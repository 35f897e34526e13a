"""The safetensors layout: a file in, its tensors' positions out; tensor specs in, a header out.

Nothing the header says is believed: its size, offsets and shapes are checked against each other and against the file
before a byte of data is read (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llama31_core.checkpoint.dtypes import BY_SAFETENSORS, DType
from llama31_core.checkpoint.stored import OpenFile, StoredTensor, is_shape
from llama31_core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
METADATA_KEY = "__metadata__"


def is_safetensors(file: OpenFile) -> bool:
    """Whether the file starts like safetensors: a header length, then a JSON object."""
    if file.size_bytes < 10:
        return False
    start = file.read(0, 9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**48


def parse_safetensors(file: OpenFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        CheckpointError: the header is no valid JSON, lies about sizes, or its tensors overlap or leave gaps.
    """
    header, data_start = _read_header(file)
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: {METADATA_KEY} must map strings to strings")
    data_size = file.size_bytes - data_start
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _read_entry(file, name, entry)
        if end > data_size:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} ends at byte {end} of the data, the file has {data_size}; "
                "it is truncated or its header lies"
            )
        tensors[name] = StoredTensor(file.path, shape, dtype, ((data_start + begin, end - begin),))
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else f"leaves a gap of {begin - position} bytes"
            raise CheckpointError(f"{file.path}: tensor {name!r} {what} (data_offsets [{begin}, {end}])")
        position = end
    if position != data_size:
        raise CheckpointError(f"{file.path}: {data_size - position} bytes after the last tensor belong to none")
    return tensors, metadata


def _read_header(file: OpenFile) -> tuple[dict[str, Any], int]:
    if file.size_bytes < 8:
        raise CheckpointError(f"{file.path} is not safetensors: it has {file.size_bytes} bytes")
    size = int.from_bytes(file.read(0, 8), "little")
    if size > min(MAX_HEADER_BYTES, file.size_bytes - 8):
        raise CheckpointError(
            f"{file.path}: header length {size} exceeds {min(MAX_HEADER_BYTES, file.size_bytes - 8)}; "
            "the file is truncated or no safetensors"
        )
    try:
        header = json.loads(file.read(8, size), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: the header is a JSON {type(header).__name__}, expected an object")
    return header, 8 + size


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return result


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read_entry(file: OpenFile, name: str, entry: object) -> tuple[DType, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file.path}: tensor {name!r} must have dtype, shape and data_offsets, got {entry!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not is_shape(shape):
        raise CheckpointError(f"{file.path}: tensor {name!r} has shape {shape!r}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{file.path}: tensor {name!r} has data_offsets {offsets!r}, expected [begin, end]")
    dtype = BY_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        allowed = ", ".join(BY_SAFETENSORS)
        raise CheckpointError(f"{file.path}: tensor {name!r} has dtype {entry['dtype']!r}, allowed are {allowed}")
    size = math.prod(shape) * dtype.size_bytes
    if offsets[1] - offsets[0] != size:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} of shape {tuple(shape)} in {dtype.name} takes {size} bytes, "
            f"its data_offsets {offsets} say {offsets[1] - offsets[0]}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def build_header(tensors: Mapping[str, tuple[DType, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a safetensors file that holds `tensors` in this order."""
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.size_bytes
        entries[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return len(text).to_bytes(8, "little") + text
