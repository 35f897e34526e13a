"""The conversion: an opened source in, a model directory or one checkpoint file out, tensor by tensor.

Rows are read, cast and written in chunks, so memory does not depend on the model. What is written appears under its
name only when all of it is on disk.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama31_ckpt import __version__
from llama31_ckpt.progress import byte_bar
from llama31_ckpt.sources import Source
from llama31_core.checkpoint.dtypes import Array, dtype_of
from llama31_core.checkpoint.manifest import describe_file, write_manifest
from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.shapes import parameter_shapes, report_differences
from llama31_core.checkpoint.staging import check_destination, staged_directory, staged_file
from llama31_core.checkpoint.writer import (
    TensorSpec,
    WrittenFile,
    plan_shards,
    row_chunks,
    write_ckpt,
    write_index,
    write_safetensors,
)
from llama31_core.errors import CheckpointError

TOOL = f"llama31-ckpt {__version__}"
FILE_SUFFIXES = (".ckpt", ".safetensors")


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    destination: Path
    num_tensors: int
    size_bytes: int
    dtype: str
    seconds: float
    notes: tuple[str, ...]


def convert(
    source: Source,
    destination: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write `source` under canonical names.

    Args:
        source: from `open_source`.
        destination: a model directory to make; or a file, by its suffix `.ckpt` or `.safetensors`, beside which
            `<file>.manifest.json` is written.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the dtype of each tensor.
        max_shard_bytes: the size at which a model directory starts another file.
        overwrite: replace an existing destination.

    Raises:
        CheckpointError: tensors that do not fit the config, a destination that exists, lies in the source or has no
            room, or values beyond the range of `dtype`. Nothing is left behind.
    """
    started = time.monotonic()
    check_apart(source.path, destination)
    check_destination(destination, overwrite=overwrite)
    specs, notes = plan_tensors(source, dtype)
    size_bytes = sum(spec.size_bytes for spec in specs)
    check_room(destination, size_bytes)
    main_dtype = _main_dtype(specs)
    with byte_bar(size_bytes, "convert") as bar:

        def chunks(spec: TensorSpec) -> Iterator[Array]:
            for chunk in read_rows(source.weights, spec.name):
                yield chunk
                bar.update(chunk.size * spec.dtype.size_bytes)

        if destination.suffix in FILE_SUFFIXES:
            with staged_file(destination, overwrite=overwrite) as part:
                write = write_ckpt if destination.suffix == ".ckpt" else write_safetensors
                written = write(part, specs, chunks)
            written = WrittenFile(destination.name, written.sha256, written.size_bytes)
            manifest = destination.with_name(destination.name + ".manifest.json")
            write_manifest(manifest, [written], dtype=main_dtype, source=source.describe(), tool=TOOL)
        else:
            with staged_directory(destination, overwrite=overwrite) as part:
                shards = plan_shards(specs, max_shard_bytes)
                files = [write_safetensors(part / name, shard, chunks) for name, shard in shards.items()]
                index = write_index(part, shards)
                files += [] if index is None else [index]
                files += write_sidecars(source, part)
                write_manifest(part, files, dtype=main_dtype, source=source.describe(), tool=TOOL)
    seconds = time.monotonic() - started
    return Summary(destination, len(specs), size_bytes, main_dtype, seconds, (*source.notes, *notes))


def check_apart(source: Path, destination: Path) -> None:
    """Raise CheckpointError if one of the two lies in the other."""
    origin, target = source.resolve(), destination.resolve()
    if origin == target or (origin.is_dir() and origin in target.parents) or target in origin.parents:
        raise CheckpointError(f"destination {destination} and source {source} lie in each other; choose another place")


def check_room(destination: Path, size_bytes: int) -> None:
    """Raise CheckpointError if the file system of `destination` has less than `size_bytes` free."""
    existing = next(path for path in destination.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size_bytes:
        raise CheckpointError(
            f"{destination} needs {size_bytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free; free space first"
        )


def plan_tensors(source: Source, dtype: str | None) -> tuple[list[TensorSpec], tuple[str, ...]]:
    """The tensors to write, in the order of the config, and notes on what is left out.

    Raises:
        CheckpointError: the source has not just the tensors of its config.
    """
    weights, expected = source.weights, parameter_shapes(source.config)
    found = {name: weights.shape(name) for name in weights.names()}
    notes = []
    if source.ignored:
        notes.append(f"{len(source.ignored)} entries that are no weights were left out ({source.ignored[0]}, …)")
    if LM_HEAD in found and LM_HEAD not in expected and found[LM_HEAD] == found.get(EMBEDDING):
        _check_tied_head(weights)
        del found[LM_HEAD]
        notes.append(f"{LM_HEAD} equals the tied embedding and was left out")
    report_differences(str(source.path), found, expected)
    specs = [
        TensorSpec(name, shape, dtype_of(dtype if dtype is not None else weights.dtype(name)))
        for name, shape in expected.items()
    ]
    return specs, tuple(notes)


def _check_tied_head(weights: Weights) -> None:
    for embedding, head in zip(read_rows(weights, EMBEDDING), read_rows(weights, LM_HEAD), strict=True):
        if embedding.dtype != head.dtype or not np.array_equal(embedding.view(np.uint8), head.view(np.uint8)):
            raise CheckpointError(
                f"{weights.source}: the config ties the head to the embedding, but {LM_HEAD} differs from it; "
                "set tie_word_embeddings to false"
            )


def read_rows(weights: Weights, name: str) -> Iterator[Array]:
    """A tensor in chunks of rows."""
    shape = weights.shape(name)
    row_items = int(np.prod(shape[1:]))
    for start, stop in row_chunks(shape, row_items * 4):
        yield weights.read_slice(name, (slice(start, stop),))


def write_sidecars(source: Source, directory: Path) -> list[WrittenFile]:
    """Write config and tokenizer files beside the weights."""
    source.config.save_pretrained(directory)
    names = ["config.json"]
    for path in source.sidecars:
        shutil.copyfile(path, directory / path.name)
        names.append(path.name)
    for name, text in source.texts.items():
        (directory / name).write_text(text, encoding="utf-8")
        names.append(name)
    return [describe_file(directory / name) for name in names]


def _main_dtype(specs: Sequence[TensorSpec]) -> str:
    """The dtype that most bytes have."""
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.size_bytes
    return max(sizes, key=lambda name: sizes[name])
