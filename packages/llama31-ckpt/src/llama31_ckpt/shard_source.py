"""Opening a checkpoint that lies over ranks: a directory of `rank_N` directories in, a source out.

Where those have our manifests, these say what belongs where. Where MindSpore or MindFormers wrote them, a strategy file
(or nothing but the config and a mesh) says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llama31_core.checkpoint.manifest import MANIFEST_NAME
from llama31_core.checkpoint.reader import open_weights
from llama31_core.checkpoint.sharded import (
    Part,
    ShardedWeights,
    check_ranks,
    open_sharded,
    rank_directories,
    read_rank_layout,
)
from llama31_core.errors import CheckpointError
from llama31_core.parallel.layout import Layout


def is_sharded(path: Path) -> bool:
    """Whether there are `rank_N` directories in a directory."""
    return bool(rank_directories(path))


def open_shards(path: Path, layout: Layout | None = None) -> ShardedWeights:
    """Open the ranks of a checkpoint.

    Args:
        path: the directory of the `rank_N` directories.
        layout: what belongs where, for ranks without manifests; None takes the manifests.

    Raises:
        CheckpointError: ranks are missing or do not fit each other or the layout.
        ConfigError: the layout does not know a tensor.
    """
    if layout is None:
        return open_sharded(path)
    directories = rank_directories(path)
    check_ranks(path, directories, layout.world_size)
    parts = {rank: _parts_of(directory, layout, rank) for rank, directory in directories.items()}
    _check_complete(path, layout, parts)
    weights = ShardedWeights(path, parts)
    weights.check_whole()
    return weights


def _check_complete(path: Path, layout: Layout, parts: Mapping[int, Mapping[str, Part]]) -> None:
    """Raise CheckpointError if a rank lacks a tensor of which the layout gives it a part."""
    shapes = {name: part.full_shape for own in parts.values() for name, part in own.items()}
    for rank, own in parts.items():
        lacking = [n for n, shape in shapes.items() if n not in own and layout.place(n, shape, rank) is not None]
        if lacking:
            raise CheckpointError(
                f"{path / f'rank_{rank}'} lacks {len(lacking)} tensors that the layout gives it, for instance "
                f"{lacking[0]}; is it the layout of this checkpoint?"
            )


def _parts_of(directory: Path, layout: Layout, rank: int) -> dict[str, Part]:
    parts = {}
    with open_weights(directory) as reader:
        for name in (*reader.names(), *reader.states):
            shape = reader.shape(name)
            full_shape = layout.full_shape(name, shape)
            slices = layout.place(name, full_shape, rank)
            if slices is None:
                raise CheckpointError(f"{reader.source} holds {name}, which the layout gives to other pipeline stages")
            part = Part(full_shape, tuple((piece.start, piece.stop) for piece in slices))
            if part.shape != shape:
                raise CheckpointError(f"{reader.source}: {name} has shape {shape}, the layout says {part.shape}")
            parts[name] = part
    if (directory / MANIFEST_NAME).is_file() and read_rank_layout(directory).parts != parts:
        raise CheckpointError(f"{directory} has a manifest that says otherwise than the layout given for it")
    return parts
