"""A checkpoint that lies in parts, one `rank_N` directory for each rank: directories in, whole tensors or slices out.

Each rank's `manifest.json` says under `layout` where its parts belong, so that a checkpoint is read without knowing the
mesh it was made for, and a rank of another mesh reads just the bytes it needs, from whichever ranks hold them:

    {"world_size": 4, "rank": 1, "checkpoint": "<same for all ranks>", "mesh": {"dp": 1, "tp": 2, ...},
     "tensors": {"lm_head.weight": {"full_shape": [96, 32], "start": [48, 0], "shape": [48, 32]}, ...}}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from llama31_core.checkpoint.contents import RANK
from llama31_core.checkpoint.dtypes import BY_NAME, Array
from llama31_core.checkpoint.manifest import MANIFEST_NAME, read_manifest
from llama31_core.checkpoint.names import is_training_state, order_key
from llama31_core.checkpoint.reader import WeightsReader, open_weights
from llama31_core.checkpoint.stored import is_shape, resolve_index
from llama31_core.errors import CheckpointError

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """What one rank holds of one tensor.

    Attributes:
        full_shape: of the whole tensor.
        box: (start, stop) of the part on every axis.
    """

    full_shape: Shape
    box: Box

    @property
    def shape(self) -> Shape:
        """Of the part."""
        return tuple(stop - start for start, stop in self.box)


@dataclass(frozen=True)
class RankLayout:
    """The `layout` of one rank's manifest."""

    rank: int
    world_size: int
    checkpoint: str
    mesh: dict[str, Any] | None
    parts: dict[str, Part]

    def to_manifest(self) -> dict[str, Any]:
        """Its JSON form."""
        tensors = {
            name: {
                "full_shape": list(part.full_shape),
                "start": [start for start, _ in part.box],
                "shape": list(part.shape),
            }
            for name, part in self.parts.items()
        }
        return {
            "world_size": self.world_size,
            "rank": self.rank,
            "checkpoint": self.checkpoint,
            "mesh": self.mesh,
            "tensors": tensors,
        }


def rank_directories(path: Path) -> dict[int, Path]:
    """The `rank_N` directories in a directory, by rank."""
    found = ((RANK.fullmatch(entry.name), entry) for entry in path.iterdir()) if path.is_dir() else ()
    return dict(sorted((int(match[1]), entry) for match, entry in found if match and entry.is_dir()))


def read_rank_layout(directory: Path) -> RankLayout:
    """What a rank's manifest says of its parts.

    Raises:
        CheckpointError: no manifest, or one without a layout or with an impossible one.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST_NAME} that says where its parts belong; give the strategy")
    layout = read_manifest(path).get("layout")
    try:
        if not isinstance(layout, dict) or not is_shape([layout["rank"], layout["world_size"]]):
            raise TypeError
        parts = {name: _read_part(entry) for name, entry in layout["tensors"].items()}
        mesh = dict(layout["mesh"]) if layout["mesh"] is not None else None
        result = RankLayout(layout["rank"], layout["world_size"], str(layout["checkpoint"]), mesh, parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has no valid layout of a rank's parts ({error!r})") from error
    if directory.name != f"rank_{result.rank}" or result.rank >= result.world_size:
        raise CheckpointError(
            f"{path} is that of rank {result.rank} of {result.world_size}, its directory is {directory.name}; "
            "was it renamed?"
        )
    return result


def _read_part(entry: Mapping[str, Any]) -> Part:
    full, start, shape = (entry[key] for key in ("full_shape", "start", "shape"))
    if not all(map(is_shape, (full, start, shape))):
        raise ValueError("a shape is no list of sizes")
    box = tuple((begin, begin + size) for begin, size in zip(start, shape, strict=True))
    if any(stop > size for (_, stop), size in zip(box, full, strict=True)):
        raise ValueError("a part lies beyond its tensor")
    return Part(tuple(full), box)


class ShardedWeights:
    """The tensors of a checkpoint over several ranks as if it were one; reads go to the parts they meet.

    Attributes:
        source: the directory of the `rank_N` directories.
        states: optimiser and loop state, by name.
    """

    def __init__(self, source: Path, parts: Mapping[int, Mapping[str, Part]], *, prefer: int | None = None) -> None:
        """
        Args:
            source: where the `rank_N` directories are.
            parts: rank -> name -> part.
            prefer: the rank to read from where several hold the same part.

        Raises:
            CheckpointError: parts overlap, leave a gap, or disagree on the shape of the whole.
        """
        self.source = source
        self._readers: dict[int, WeightsReader] = {}
        self._lock = Lock()
        self._shapes: dict[str, Shape] = {}
        self._owners: dict[str, dict[Box, int]] = {}
        for rank in sorted(parts, key=lambda rank: (rank != prefer, rank)):
            for name, part in parts[rank].items():
                if self._shapes.setdefault(name, part.full_shape) != part.full_shape:
                    raise CheckpointError(
                        f"{source}: ranks say {name!r} has shape {self._shapes[name]} and {part.full_shape}"
                    )
                self._owners.setdefault(name, {}).setdefault(part.box, rank)
        ordered = sorted(self._shapes, key=order_key)  # whatever the stages, as in a checkpoint that was never split
        self._names = tuple(name for name in ordered if not is_training_state(name))
        self.states = tuple(name for name in ordered if is_training_state(name))

    def check_whole(self) -> None:
        """Raise CheckpointError if the parts of a tensor do not tile it."""
        for name, owners in self._owners.items():
            if not _is_grid(self._shapes[name], list(owners)):
                raise CheckpointError(
                    f"{self.source}: the parts of {name!r} do not make up its shape {self._shapes[name]} once; "
                    "ranks are missing or of different checkpoints"
                )

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> Shape:
        """Of the whole tensor."""
        return self._shapes[self._known(name)]

    def dtype(self, name: str) -> str:
        box, rank = next(iter(self._owners[self._known(name)].items()))
        return self._reader(rank, name, box).dtype(name)

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        """The selected part of the whole tensor; missing axes are taken whole.

        Raises:
            CheckpointError: no rank holds all of it, or a rank's file is not what the layout says.
        """
        wanted = tuple(resolve_index(self.shape(name), index))
        result: Array | None = None
        filled = 0
        for box, rank in self._owners[name].items():
            common = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(box, wanted, strict=True))
            if any(start >= stop for start, stop in common):
                continue
            piece = self._reader(rank, name, box).read_slice(name, _relative(common, box))
            if common == wanted:
                return piece
            if result is None:
                result = np.empty([stop - start for start, stop in wanted], dtype=piece.dtype)
            if piece.dtype != result.dtype:
                raise CheckpointError(f"{self.source}: ranks hold {name!r} as {result.dtype} and as {piece.dtype}")
            result[_relative(common, wanted)] = piece
            filled += piece.size
        size = math.prod(stop - start for start, stop in wanted)
        if filled != size:
            raise CheckpointError(f"{self.source}: ranks hold {filled} of {size} elements asked for of {name!r}")
        if result is None:  # nothing was asked for
            return np.empty([stop - start for start, stop in wanted], BY_NAME[self.dtype(name)].numpy)
        return result

    def read(self, name: str) -> Array:
        """The whole tensor."""
        return self.read_slice(name, ())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far, from all ranks."""
        return sum(reader.bytes_read for reader in self._readers.values())

    def _known(self, name: str) -> str:
        if name not in self._shapes:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        return name

    def _reader(self, rank: int, name: str, box: Box) -> WeightsReader:
        with self._lock:
            if rank not in self._readers:
                self._readers[rank] = open_weights(self.source / f"rank_{rank}")
        reader = self._readers[rank]
        expected = tuple(stop - start for start, stop in box)
        if reader.shape(name) != expected:
            raise CheckpointError(f"{reader.source}: {name!r} has shape {reader.shape(name)}, its layout {expected}")
        return reader

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> ShardedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _relative(box: Box, origin: Box) -> tuple[slice, ...]:
    return tuple(slice(start - base, stop - base) for (start, stop), (base, _) in zip(box, origin, strict=True))


def _is_grid(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether boxes are all cells of a grid that covers `shape`."""
    cells = 1
    for axis, size in enumerate(shape):
        spans = sorted({box[axis] for box in boxes})
        cells *= len(spans)
        gaps = any(before[1] != after[0] for before, after in pairwise(spans))
        if gaps or spans[0][0] != 0 or spans[-1][1] != size:
            return False
    return cells == len(boxes)


def open_sharded(path: str | Path, *, prefer: int | None = None) -> ShardedWeights:
    """Open all ranks of a sharded checkpoint.

    Raises:
        CheckpointError: ranks are missing, belong to different checkpoints, or their parts do not make up the tensors.
    """
    path = Path(path)
    layouts = read_layouts(path)
    weights = ShardedWeights(path, {rank: layout.parts for rank, layout in layouts.items()}, prefer=prefer)
    weights.check_whole()
    return weights


def read_layouts(path: Path) -> dict[int, RankLayout]:
    """The layouts of all ranks of one checkpoint.

    Raises:
        CheckpointError: ranks are missing or belong to different checkpoints.
    """
    layouts = {rank: read_rank_layout(directory) for rank, directory in rank_directories(path).items()}
    if not layouts:
        raise CheckpointError(f"{path} holds no rank_N directories")
    first = next(iter(layouts.values()))
    for layout in layouts.values():
        if (layout.checkpoint, layout.world_size) != (first.checkpoint, first.world_size):
            raise CheckpointError(
                f"{path}: rank_{first.rank} is of checkpoint {first.checkpoint[:12]} over {first.world_size} ranks, "
                f"rank_{layout.rank} of {layout.checkpoint[:12]} over {layout.world_size}; do not mix them"
            )
    check_ranks(path, layouts, first.world_size)
    return layouts


def check_ranks(path: Path, found: Mapping[int, object], world_size: int) -> None:
    """Raise CheckpointError unless just the ranks 0 to `world_size` - 1 are there."""
    missing = [rank for rank in range(world_size) if rank not in found]
    extra = [rank for rank in found if rank >= world_size]
    if missing or extra:
        problem, ranks = ("lacks", missing) if missing else ("has superfluous", extra)
        listed = ", ".join(f"rank_{rank}" for rank in ranks[:10])
        raise CheckpointError(f"{path} {problem} {len(ranks)} of {world_size} ranks: {listed}")


def read_rank(path: str | Path, slices: Mapping[str, Sequence[slice]], *, rank: int) -> Iterator[tuple[str, Array]]:
    """What a rank of a mesh needs, reading no other bytes of tensors.

    Args:
        path: a whole checkpoint (see `open_weights`), or a directory of `rank_N` directories. Of those only the rank's
            own is opened if it holds what is asked for, else those that do; it may be of another mesh.
        slices: name -> part of the whole tensor, for instance `shard.slices` of `llama31_core.parallel.plan_shards`.
        rank: the caller's.

    Raises:
        CheckpointError: damaged, or a tensor is not there.
    """
    with open_for_rank(path, slices, rank=rank) as weights:
        for name, index in slices.items():
            yield name, weights.read_slice(name, index)


def open_for_rank(
    path: str | Path, slices: Mapping[str, Sequence[slice]], *, rank: int
) -> WeightsReader | ShardedWeights:
    """The checkpoint opened so that `slices` can be read, from the rank's own directory alone where that has them.

    Raises:
        CheckpointError: it has not, and those of other ranks are not all there.
    """
    path = Path(path)
    directories = rank_directories(path)
    if not directories:
        return open_weights(path)
    if rank in directories:
        own = read_rank_layout(directories[rank])
        lacking = [
            name for name, index in slices.items() if name not in own.parts or not _holds(own.parts[name], index)
        ]
        if not lacking:
            return ShardedWeights(path, {rank: own.parts})
        try:
            return open_sharded(path, prefer=rank)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; they are needed because rank_{rank} has not all of {lacking[0]} ({len(lacking)} such "
                "tensors): split for the mesh of this run (vocab_emb_dp=False for a split embedding), or bring all"
            ) from error
    return open_sharded(path, prefer=rank)


def _holds(part: Part, index: Sequence[slice]) -> bool:
    wanted = resolve_index(part.full_shape, index)
    return all(a[0] <= b[0] and b[1] <= a[1] for a, b in zip(part.box, wanted, strict=True))
