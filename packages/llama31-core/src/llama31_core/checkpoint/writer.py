"""Writing tensors: specs and a source of chunks in, safetensors or MindSpore `.ckpt` files with their sha256 out.

Chunks are written as they come, so that memory holds one chunk whatever the size of the model. The functions here
write where they are told; `staging` makes the place and renames it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama31_core.checkpoint.ckpt_format import build_value_start
from llama31_core.checkpoint.dtypes import Array, DType, cast, dtype_of
from llama31_core.checkpoint.files import INDEX_NAME, SINGLE_NAME
from llama31_core.checkpoint.hashed_file import HashedFile
from llama31_core.checkpoint.hashed_file import WrittenFile as WrittenFile
from llama31_core.checkpoint.safetensors_format import build_header
from llama31_core.checkpoint.staging import staged_file, write_error
from llama31_core.errors import CheckpointError

MINDSPORE_METADATA = {"format": "ms"}  # what MindSpore's own save_checkpoint writes
CHUNK_BYTES = 8 << 20  # each costs the threads a few hand-overs of the interpreter's lock


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size_bytes


# The chunks of one tensor in row-major order; they need not be of equal size.
ChunkSource = Callable[[TensorSpec], Iterable[Array]]


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], chunks: ChunkSource, *, metadata: Mapping[str, str] = MINDSPORE_METADATA
) -> WrittenFile:
    """Write a safetensors file with these tensors in this order.

    Raises:
        CheckpointError: the disk is full or refuses, or the chunks do not fill their tensor.
    """
    header = build_header({spec.name: (spec.dtype, spec.shape) for spec in specs}, metadata)
    return _write(path, specs, chunks, header, lambda spec, size: b"")


def write_ckpt(path: Path, specs: Sequence[TensorSpec], chunks: ChunkSource) -> WrittenFile:
    """Write a MindSpore `.ckpt` file with these tensors in this order.

    Raises:
        CheckpointError: as `write_safetensors`.
    """
    return _write(path, specs, chunks, b"", lambda s, size: build_value_start(s.name, s.dtype, s.shape, size))


def _write(
    path: Path,
    specs: Sequence[TensorSpec],
    chunks: ChunkSource,
    header: bytes,
    chunk_start: Callable[[TensorSpec, int], bytes],
) -> WrittenFile:
    try:
        with HashedFile(path) as file:
            file.write(header)
            for spec in specs:
                written = 0
                for chunk in chunks(spec):
                    typed = np.ascontiguousarray(cast(chunk, spec.dtype, tensor=spec.name))
                    data = typed.reshape(-1).view(np.uint8).data
                    file.write(chunk_start(spec, len(data)))
                    file.write(data)
                    written += len(data)
                if written != spec.size_bytes:
                    raise CheckpointError(
                        f"tensor {spec.name!r} of shape {spec.shape} takes {spec.size_bytes} bytes, got {written}"
                    )
        return file.finished()
    except OSError as error:
        raise write_error(path, error) from error


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int | None) -> dict[str, list[TensorSpec]]:
    """Which file holds which tensors: file name -> specs; a tensor larger than the limit has a file of its own."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if max_shard_bytes is not None and shards[-1] and filled + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def build_index(shards: Mapping[str, Sequence[TensorSpec]]) -> str:
    """The text of the index JSON of a sharded checkpoint."""
    weight_map = {spec.name: file_name for file_name, specs in shards.items() for spec in specs}
    total_size = sum(spec.size_bytes for specs in shards.values() for spec in specs)
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2) + "\n"


def write_index(directory: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> WrittenFile | None:
    """Write the index of more than one shard; None for a single file, which needs none."""
    if len(shards) < 2:
        return None
    path = directory / INDEX_NAME
    try:
        with HashedFile(path) as file:
            file.write(build_index(shards).encode())
        return file.finished()
    except OSError as error:
        raise write_error(path, error) from error


def row_chunks(shape: tuple[int, ...], row_bytes: int, *, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) rows that cut a tensor in chunks of about `CHUNK_BYTES`, at multiples of `multiple` rows."""
    rows = shape[0] if shape else 1
    step = max(1, CHUNK_BYTES // max(1, row_bytes * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def save_weights(
    destination: str | Path,
    tensors: Iterable[tuple[str, Array]],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> list[WrittenFile]:
    """Save arrays under canonical names.

    Args:
        destination: a path that ends in `.ckpt` or `.safetensors`; or an existing directory, which gets
            `model.safetensors` or shards with an index.
        tensors: names and arrays, in the order in which they are written.
        dtype: `fp32`, `bf16` or `fp16`; None keeps each array's own.
        max_shard_bytes: start a new file beyond this many bytes (a directory only).
        overwrite: replace existing files.

    Returns:
        The files written, for the manifest.

    Raises:
        CheckpointError: the destination exists or cannot be written, a name comes twice, values do not fit `dtype`.
    """
    arrays: dict[str, Array] = {}
    for name, array in tensors:
        if name in arrays:
            raise CheckpointError(f"tensor {name!r} is given twice")
        arrays[name] = array
    specs = [
        TensorSpec(name, array.shape, dtype_of(dtype) if dtype else dtype_of(array.dtype))
        for name, array in arrays.items()
    ]

    def chunks(spec: TensorSpec) -> Iterator[Array]:
        array = arrays[spec.name]
        if not array.shape:
            yield array
        for start, stop in row_chunks(array.shape, array.nbytes // max(1, len(array))) if array.shape else ():
            yield array[start:stop]

    destination = Path(destination)
    if destination.suffix in (".ckpt", ".safetensors"):
        return [_save_file(destination, specs, chunks, overwrite)]
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is no directory and ends in neither .ckpt nor .safetensors")
    shards = plan_shards(specs, max_shard_bytes)
    written = [_save_file(destination / name, part, chunks, overwrite) for name, part in shards.items()]
    index = write_index(destination, shards)
    return written if index is None else [*written, index]


def _save_file(path: Path, specs: Sequence[TensorSpec], chunks: ChunkSource, overwrite: bool) -> WrittenFile:
    with staged_file(path, overwrite=overwrite) as part:
        write = write_ckpt if path.suffix == ".ckpt" else write_safetensors
        written = write(part, specs, chunks)
    return WrittenFile(path.name, written.sha256, written.size_bytes)
