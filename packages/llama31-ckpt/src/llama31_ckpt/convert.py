"""The conversion: an opened source in, a model directory or one checkpoint file out, tensor by tensor.

Rows are read ahead in a thread while the chunk before is cast, hashed and written, so memory holds a few chunks
whatever the model. What is written appears under its name only when all of it is on disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama31_ckpt import __version__
from llama31_ckpt.plan import Plan, plan_tensors
from llama31_ckpt.progress import byte_bar
from llama31_ckpt.reading import chunk_source, in_threads
from llama31_ckpt.resume import ShardRecord
from llama31_ckpt.sources import Source
from llama31_core.checkpoint.manifest import describe_file, manifest_beside, write_manifest
from llama31_core.checkpoint.names import Scheme
from llama31_core.checkpoint.staging import check_destination, staged_directory, staged_file, write_error
from llama31_core.checkpoint.writer import (
    MINDSPORE_METADATA,
    WrittenFile,
    plan_shards,
    write_ckpt,
    write_index,
    write_safetensors,
)
from llama31_core.errors import CheckpointError

TOOL = f"llama31-ckpt {__version__}"
FILE_SUFFIXES = (".ckpt", ".safetensors")
_SHARDS_AT_A_TIME = 2  # a file's sha256 is one core's work
_METADATA = {"mindformers": MINDSPORE_METADATA, "hf": {"format": "pt"}}


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        dtype: `fp32`, `bf16` or `fp16`; None keeps the dtype of each tensor.
        naming: `mindformers`, or `hf` for a directory that transformers loads.
        qkv_concat: stack wq, wk, wv and w1, w3 as MindFormers' `qkv_concat` does.
        max_shard_bytes: the size at which a directory starts another file.
        overwrite: replace an existing destination.
        resume: keep finished shards of a conversion that fails, and continue after those of an earlier try.
        states: write optimiser and loop state too, each in its own dtype.
    """

    dtype: str | None = None
    naming: Scheme = "mindformers"
    qkv_concat: bool = False
    max_shard_bytes: int | None = None
    overwrite: bool = False
    resume: bool = False
    states: bool = False


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    destination: Path
    num_tensors: int
    size_bytes: int
    dtype: str
    seconds: float
    notes: tuple[str, ...]


def convert(source: Source, destination: Path, options: Options = Options()) -> Summary:
    """Write `source` to `destination`.

    Args:
        source: from `open_source`.
        destination: a directory to make; or a file, by its suffix `.ckpt` or `.safetensors`, beside which
            `<file>.manifest.json` is written.
        options: names, dtype, shards.

    Raises:
        CheckpointError: tensors that do not fit the config, a destination that exists, lies in the source or has no
            room, or values beyond the range of the dtype. Nothing is left behind.
    """
    started = time.monotonic()
    to_file = destination.suffix in FILE_SUFFIXES
    _check_options(destination, options, to_file)
    for path in source.inputs:
        check_apart(path, destination)
    check_destination(destination, overwrite=options.overwrite)
    plan = plan_tensors(
        source, dtype=options.dtype, naming=options.naming, qkv_concat=options.qkv_concat, states=options.states
    )
    check_room(destination, plan.size_bytes)
    with byte_bar(plan.size_bytes, "convert") as bar:
        if to_file:
            _convert_to_file(source, plan, destination, options, bar.update)
        else:
            _convert_to_directory(source, plan, destination, options, bar.update)
    seconds = time.monotonic() - started
    return Summary(
        destination, len(plan.specs), plan.size_bytes, plan.main_dtype, seconds, (*source.notes, *plan.notes)
    )


def _check_options(destination: Path, options: Options, to_file: bool) -> None:
    if to_file and (options.max_shard_bytes or options.resume):
        raise CheckpointError(
            f"{destination} is one file: --max_shard_size and --resume need a directory as --output_path"
        )
    if options.naming == "hf" and (options.qkv_concat or destination.suffix == ".ckpt"):
        raise CheckpointError(
            "HF checkpoints are safetensors without fused tensors; drop --qkv_concat or the .ckpt suffix"
        )


def _convert_to_file(
    source: Source, plan: Plan, destination: Path, options: Options, on_bytes: Callable[[int], object]
) -> None:
    chunks = chunk_source(source.weights, plan.specs, plan.parts, on_bytes)
    with staged_file(destination, overwrite=options.overwrite) as part:
        if destination.suffix == ".ckpt":
            written = write_ckpt(part, plan.specs, chunks)
        else:
            written = write_safetensors(part, plan.specs, chunks, metadata=_METADATA[options.naming])
    written = WrittenFile(destination.name, written.sha256, written.size_bytes)
    write_manifest(
        manifest_beside(destination),
        [written],
        dtype=plan.main_dtype,
        source=source.describe(),
        tool=TOOL,
        config=_config_of(source, plan.main_dtype),
    )


def _convert_to_directory(
    source: Source, plan: Plan, destination: Path, options: Options, on_bytes: Callable[[int], object]
) -> None:
    built = source.build_files()
    with staged_directory(destination, overwrite=options.overwrite, resume=options.resume) as part:
        shards = plan_shards(plan.specs, options.max_shard_bytes)
        planned = {
            name: [(spec.name, spec.shape, spec.dtype.name, plan.parts[spec.name]) for spec in specs]
            for name, specs in shards.items()
        }
        record = ShardRecord(part, source.inputs, planned, enabled=options.resume)

        def write(name: str) -> WrittenFile:
            shard = shards[name]
            written = record.finished(name)
            if written is None:
                chunks = chunk_source(source.weights, shard, plan.parts, on_bytes)
                written = write_safetensors(part / name, shard, chunks, metadata=_METADATA[options.naming])
                record.add(name, written)
            else:
                on_bytes(sum(spec.size_bytes for spec in shard))
            return written

        files = in_threads(write, shards, _SHARDS_AT_A_TIME)
        record.remove()
        index = write_index(part, shards)
        files += [] if index is None else [index]
        files += write_sidecars(source, built, plan.main_dtype, part)
        write_manifest(part, files, dtype=plan.main_dtype, source=source.describe(), tool=TOOL)


def check_apart(source: Path, destination: Path) -> None:
    """Raise CheckpointError if one of the two lies in the other."""
    origin, target = source.resolve(), destination.resolve()
    if origin == target or (origin.is_dir() and origin in target.parents) or target in origin.parents:
        raise CheckpointError(f"destination {destination} and source {source} lie in each other; choose another place")


def check_room(destination: Path, size_bytes: int) -> None:
    """Raise CheckpointError if `destination` cannot be made, or its file system has less than `size_bytes` free."""
    try:
        existing = next(path for path in destination.absolute().parents if path.exists())
        with tempfile.TemporaryDirectory(dir=existing, prefix=".llama31-"):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        raise write_error(destination, error) from error
    if free < size_bytes:
        raise CheckpointError(
            f"{destination} needs {size_bytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free; free space first"
        )


def _config_of(source: Source, dtype: str) -> dict[str, Any]:
    """The content of config.json for the output."""
    return {**source.config.to_hf(), "torch_dtype": dtype}


def write_sidecars(source: Source, files: Mapping[str, bytes], dtype: str, directory: Path) -> list[WrittenFile]:
    """Write config and tokenizer files beside the weights; `files` are those that the source builds."""
    built = {"config.json": (json.dumps(_config_of(source, dtype), indent=2) + "\n").encode(), **files}
    for name, content in built.items():
        (directory / name).write_bytes(content)
    for path in source.sidecars:
        shutil.copyfile(path, directory / path.name)
    return [describe_file(directory / name) for name in (*built, *(path.name for path in source.sidecars))]
