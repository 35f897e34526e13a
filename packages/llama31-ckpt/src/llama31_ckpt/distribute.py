"""Spreading a checkpoint over ranks: a source (whole, or of another layout) and a layout in, `rank_N` directories out.

Every rank's tensors are read as the slices that it holds, a few MB at a time, from the files that have them: nothing
is merged in between. The result appears under its name only when all ranks are on disk.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama31_ckpt.convert import TOOL, Summary, check_apart, check_room, write_sidecars
from llama31_ckpt.progress import byte_bar
from llama31_ckpt.reading import in_threads, read_ahead
from llama31_ckpt.resume import ShardRecord, file_stats
from llama31_ckpt.sources import Source
from llama31_core.checkpoint.dtypes import BY_NAME, Array
from llama31_core.checkpoint.manifest import write_manifest
from llama31_core.checkpoint.names import fused_members, fused_name, split_moment
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.shapes import check_weights
from llama31_core.checkpoint.sharded import Part, RankLayout
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
        resume: keep finished ranks of a try that fails, and continue after those of an earlier one.
        qkv_concat: stack a rank's parts of wq, wk, wv and of w1, w3 as MindFormers does.
    """

    suffix: str = "safetensors"
    prefix: str = "checkpoint_"
    overwrite: bool = False
    workers: int = 1
    resume: bool = False
    qkv_concat: bool = False

    def file_name(self, rank: int) -> str:
        """Of a rank's file."""
        return f"{self.prefix}{rank}.{self.suffix}"


@dataclass(frozen=True)
class RankPlan:
    """What is written for one rank.

    Attributes:
        rank: whose it is.
        parts: of each tensor, by its canonical name.
        specs: what the file holds, in order.
        members: for each entry of the file the tensors whose parts it stacks.
    """

    rank: int
    parts: dict[str, Part]
    specs: tuple[TensorSpec, ...]
    members: dict[str, tuple[str, ...]]

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
    for path in source.inputs:
        check_apart(path, destination)
    check_destination(destination, overwrite=options.overwrite)
    if source.found_config is not None:
        check_weights(source.weights, source.found_config)
    plans = [plan_rank(source, layout, rank, qkv_concat=options.qkv_concat) for rank in range(layout.world_size)]
    size_bytes = sum(plan.size_bytes for plan in plans)
    check_room(destination, size_bytes)
    dtype, built = _main_dtype(plans), source.build_files()
    with (
        byte_bar(size_bytes, "shard") as bar,
        staged_directory(destination, overwrite=options.overwrite, resume=options.resume) as part,
    ):
        record = ShardRecord(part, source.inputs, [_describe(plan, options) for plan in plans], enabled=options.resume)

        def write(plan: RankPlan) -> WrittenFile:
            key = f"rank_{plan.rank}/{options.file_name(plan.rank)}"
            written = record.finished(key)
            if written is None:
                written = write_rank(source.weights, plan, part / f"rank_{plan.rank}", options, bar.update)
                record.add(key, written)
            else:
                bar.update(plan.size_bytes)
            return written

        files = in_threads(write, plans, options.workers)
        record.remove()
        sidecars = [] if source.found_config is None else write_sidecars(source, built, dtype, part)
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
    plan = plan_rank(source, layout, rank, qkv_concat=options.qkv_concat)
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


def _describe(plan: RankPlan, options: ShardOptions) -> list[object]:
    """All that decides the bytes of a rank's file, for `ShardRecord`."""
    entries = [(spec.name, spec.shape, spec.dtype.name, plan.members[spec.name]) for spec in plan.specs]
    return [options.file_name(plan.rank), entries, [(name, part.box) for name, part in plan.parts.items()]]


def plan_rank(source: Source, layout: Layout, rank: int, *, qkv_concat: bool = False) -> RankPlan:
    """What a rank of the layout holds of the source."""
    weights = source.weights
    parts: dict[str, Part] = {}
    for name in (*weights.names(), *source.states):
        full_shape = weights.shape(name)
        slices = layout.place(name, full_shape, rank)
        if slices is not None:
            parts[name] = Part(full_shape, tuple((piece.start, piece.stop) for piece in slices))
    if not parts:
        raise ConfigError(f"the layout gives rank {rank} nothing of {source.path}")
    members: dict[str, tuple[str, ...]] = {name: (name,) for name in parts}
    if qkv_concat:
        members = {fused: fused_members(fused) for fused in map(fused_name, parts)}
    specs = tuple(_plan_entry(source, entry, members[entry], parts) for entry in members)
    return RankPlan(rank, parts, specs, members)


def _plan_entry(source: Source, entry: str, members: Sequence[str], parts: Mapping[str, Part]) -> TensorSpec:
    """An entry of a rank's file: a part of a tensor, or the parts of several stacked."""
    missing = [name for name in members if name not in parts]
    if missing:
        raise CheckpointError(f"{source.path}: {entry} would stack {missing[0]}, which is not there")
    dtypes = {source.weights.dtype(name) for name in members}
    if len(dtypes) > 1 or not dtypes <= set(BY_NAME):
        raise CheckpointError(
            f"{source.path}: {entry} has dtype {' and '.join(sorted(dtypes))}, which no shard can hold"
        )
    prefix = split_moment(entry)[0]
    if len(members) > 1 and any(
        parts[name].box != parts.get(name.removeprefix(prefix), parts[name]).box for name in members
    ):
        raise ConfigError(
            f"{entry} would stack moments that are split over dp; leave shard_optimizer or qkv_concat out"
        )
    shapes = [parts[name].shape for name in members]
    shape = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return TensorSpec(entry, shape, BY_NAME[dtypes.pop()])


def write_rank(
    weights: Weights, plan: RankPlan, directory: Path, options: ShardOptions, on_bytes: Callable[[int], object]
) -> WrittenFile:
    """Write the file of one rank."""
    directory.mkdir(exist_ok=True)
    chunks = read_ahead(
        chunk
        for spec in plan.specs
        for name in plan.members[spec.name]
        for chunk in _read_part(weights, name, plan.parts[name], spec.dtype.size_bytes)
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


def _read_part(weights: Weights, name: str, part: Part, item_bytes: int) -> Iterator[Array]:
    """A part of a tensor in chunks of its rows."""
    if not part.box:
        yield weights.read_slice(name, ())
        return
    first, columns = part.box[0][0], [slice(*bounds) for bounds in part.box[1:]]
    for start, stop in row_chunks(part.shape, math.prod(part.shape[1:]) * item_bytes):
        yield weights.read_slice(name, (slice(first + start, first + stop), *columns))


def _main_dtype(plans: Sequence[RankPlan]) -> str:
    """The dtype that most bytes of weights have."""
    sizes: dict[str, int] = {}
    for spec in (spec for plan in plans for spec in plan.specs):
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.size_bytes
    return max(sizes, key=lambda name: sizes[name])
