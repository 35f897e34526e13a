"""Spreading a checkpoint over ranks: a source (whole, or of another layout) and a layout in, `rank_N` directories out.

Every rank's tensors are read as the slices that it holds, a few MB at a time, from the files that have them: nothing
is merged in between. The result appears under its name only when all ranks are on disk.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama31_ckpt.convert import TOOL, Summary, check_apart, check_room, write_sidecars
from llama31_ckpt.progress import byte_bar
from llama31_ckpt.reading import in_threads, read_ahead
from llama31_ckpt.resume import file_stats
from llama31_ckpt.sources import Source
from llama31_core.checkpoint.dtypes import BY_NAME, Array
from llama31_core.checkpoint.manifest import write_manifest
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.shapes import check_weights
from llama31_core.checkpoint.sharded import Box, Part, RankLayout
from llama31_core.checkpoint.staging import check_destination, staged_directory
from llama31_core.checkpoint.writer import TensorSpec, WrittenFile, row_chunks, write_ckpt, write_safetensors
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.parallel.layout import Layout

SUFFIXES = ("safetensors", "ckpt")


@dataclass(frozen=True)
class ShardOptions:
    """How to write the ranks.

    Attributes:
        suffix: `safetensors` or `ckpt`.
        prefix: a rank's file is `rank_N/<prefix>N.<suffix>`.
        overwrite: replace an existing destination.
        workers: ranks that are written at a time.
    """

    suffix: str = "safetensors"
    prefix: str = "checkpoint_"
    overwrite: bool = False
    workers: int = 1

    def file_name(self, rank: int) -> str:
        """Of a rank's file."""
        return f"{self.prefix}{rank}.{self.suffix}"


@dataclass(frozen=True)
class RankPlan:
    """What is written for one rank."""

    rank: int
    parts: dict[str, Part]
    specs: tuple[TensorSpec, ...]

    @property
    def size_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.specs)


def distribute(source: Source, destination: Path, layout: Layout, options: ShardOptions = ShardOptions()) -> Summary:
    """Write `source` for the ranks of `layout`.

    Args:
        source: from `open_source`; optimiser and loop state in it go along.
        destination: a directory to make.
        layout: who holds what.
        options: format and names of the files.

    Raises:
        CheckpointError: tensors that do not fit the config, a destination that exists, lies in the source or has no
            room. Nothing is left behind.
        ConfigError: the tensors do not divide as the layout says.
    """
    started = time.monotonic()
    _check_options(options)
    check_apart(source.path, destination)
    check_destination(destination, overwrite=options.overwrite)
    if source.found_config is not None:
        check_weights(source.weights, source.found_config)
    plans = [plan_rank(source, layout, rank) for rank in range(layout.world_size)]
    size_bytes = sum(plan.size_bytes for plan in plans)
    check_room(destination, size_bytes)
    dtype = _main_dtype(plans)
    with (
        byte_bar(size_bytes, "shard") as bar,
        staged_directory(destination, overwrite=options.overwrite) as part,
    ):

        def write(plan: RankPlan) -> WrittenFile:
            return write_rank(source.weights, plan, part / f"rank_{plan.rank}", options, bar.update)

        files = in_threads(write, plans, options.workers)
        sidecars = [] if source.found_config is None else write_sidecars(source, dtype, part)
        # The same for all ranks, and another one if a byte of any rank is.
        checkpoint = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()
        world = {"world_size": layout.world_size, "checkpoint": checkpoint, "mesh": layout.mesh()}
        origin = source.describe()
        for plan, file in zip(plans, files, strict=True):
            own = RankLayout(plan.rank, layout.world_size, checkpoint, layout.mesh(), plan.parts)
            directory = part / f"rank_{plan.rank}"
            write_manifest(directory, [file], dtype=dtype, source=origin, tool=TOOL, layout=own.to_manifest())
        write_manifest(part, sidecars, dtype=dtype, source=origin, tool=TOOL, layout=world)
    seconds = time.monotonic() - started
    return Summary(destination, len(plans[0].specs), size_bytes, dtype, seconds, source.notes)


def distribute_rank(
    source: Source, destination: Path, layout: Layout, rank: int, options: ShardOptions = ShardOptions()
) -> Summary:
    """Write one rank's directory alone, `destination/rank_N`, for programs that share the ranks out among them.

    Raises:
        CheckpointError, ConfigError: as `distribute`.
    """
    started = time.monotonic()
    _check_options(options)
    check_apart(source.path, destination)
    if not 0 <= rank < layout.world_size:
        raise ConfigError(f"rank is {rank}, allowed is 0 to {layout.world_size - 1}")
    directory = destination / f"rank_{rank}"
    check_destination(directory, overwrite=options.overwrite)
    plan = plan_rank(source, layout, rank)
    check_room(directory, plan.size_bytes)
    dtype = _main_dtype([plan])
    with byte_bar(plan.size_bytes, "shard") as bar, staged_directory(directory, overwrite=options.overwrite) as part:
        file = write_rank(source.weights, plan, part, options, bar.update)
        # No rank knows the bytes of the others here: what they have in common is the source.
        checkpoint = hashlib.sha256(repr((file_stats(source.path), layout)).encode()).hexdigest()
        own = RankLayout(rank, layout.world_size, checkpoint, layout.mesh(), plan.parts)
        write_manifest(part, [file], dtype=dtype, source=source.describe(), tool=TOOL, layout=own.to_manifest())
    seconds = time.monotonic() - started
    return Summary(directory, len(plan.specs), plan.size_bytes, dtype, seconds, source.notes)


def _check_options(options: ShardOptions) -> None:
    name = options.file_name(0)
    if options.suffix not in SUFFIXES:
        raise CheckpointError(f"format is {options.suffix!r}, allowed are {', '.join(SUFFIXES)}")
    if Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"prefix {options.prefix!r} makes {name!r}, which is no plain file name")
    if options.workers < 1:
        raise CheckpointError(f"{options.workers} ranks at a time were asked for, at least 1 is needed")


def plan_rank(source: Source, layout: Layout, rank: int) -> RankPlan:
    """What a rank of the layout holds of the source."""
    weights = source.weights
    parts, specs = {}, []
    for name in (*weights.names(), *source.states):
        full_shape = weights.shape(name)
        slices = layout.place(name, full_shape, rank)
        if slices is None:
            continue
        dtype = weights.dtype(name)
        if dtype not in BY_NAME:
            raise CheckpointError(f"{source.path}: tensor {name!r} has dtype {dtype}, which no shard can hold")
        part = Part(full_shape, tuple((piece.start, piece.stop) for piece in slices))
        parts[name] = part
        specs.append(TensorSpec(name, part.shape, BY_NAME[dtype]))
    if not specs:
        raise ConfigError(f"the layout gives rank {rank} nothing of {source.path}")
    return RankPlan(rank, parts, tuple(specs))


def write_rank(
    weights: Weights, plan: RankPlan, directory: Path, options: ShardOptions, on_bytes: Callable[[int], object]
) -> WrittenFile:
    """Write the file of one rank."""
    directory.mkdir(exist_ok=True)
    chunks = read_ahead(
        chunk for spec in plan.specs for chunk in _read_box(weights, spec.name, plan.parts[spec.name].box, spec)
    )

    def chunks_of(spec: TensorSpec) -> Iterator[Array]:
        left = math.prod(spec.shape)
        while left > 0:
            chunk = next(chunks)
            left -= chunk.size
            yield chunk
            on_bytes(chunk.nbytes)

    write = write_ckpt if options.suffix == "ckpt" else write_safetensors
    return write(directory / options.file_name(plan.rank), plan.specs, chunks_of)


def _read_box(weights: Weights, name: str, box: Box, spec: TensorSpec) -> Iterator[Array]:
    """A part of a tensor in chunks of its rows."""
    if not box:
        yield weights.read_slice(name, ())
        return
    first, columns = box[0][0], [slice(*bounds) for bounds in box[1:]]
    row_bytes = math.prod(spec.shape[1:]) * spec.dtype.size_bytes
    for start, stop in row_chunks(spec.shape, row_bytes):
        yield weights.read_slice(name, (slice(first + start, first + stop), *columns))


def _main_dtype(plans: Sequence[RankPlan]) -> str:
    """The dtype that most bytes of weights have."""
    sizes: dict[str, int] = {}
    for spec in (spec for plan in plans for spec in plan.specs):
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.size_bytes
    return max(sizes, key=lambda name: sizes[name])
