"""Tensors that lie in parts on the ranks of a mesh, put together on rank 0: for saving a run as one process does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from mindspore import Tensor

from llama31_core.config import ModelConfig
from llama31_core.parallel.groups import Group
from llama31_core.parallel.layout import ParameterShard, Slices, plan_shards
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.transport import transport

Array = npt.NDArray[np.float32]
Part = Callable[[ParameterShard], Slices]
Box = tuple[tuple[int, int], ...]


def held(shard: ParameterShard) -> Slices:
    """What a rank has of a weight."""
    return shard.slices


def updated(shard: ParameterShard) -> Slices:
    """What a rank updates of it."""
    return shard.optimizer_slices


def plan_ranks(config: ModelConfig, parallel: ParallelConfig) -> list[dict[str, ParameterShard]]:
    """What every rank of a mesh holds."""
    return [plan_shards(config, parallel, rank) for rank in range(parallel.world_size)]


def find_owners(ranks: Sequence[Mapping[str, ParameterShard]], part: Part) -> dict[str, dict[Box, int]]:
    """For every weight the first rank that has each of its pieces.

    Args:
        ranks: of `plan_ranks`.
        part: which piece of a weight is meant, `held` or `updated`.
    """
    owners: dict[str, dict[Box, int]] = {}
    for rank, shards in enumerate(ranks):
        for name, shard in shards.items():
            owners.setdefault(name, {}).setdefault(_box(part(shard)), rank)
    return owners


def _box(piece: Slices) -> Box:
    return tuple((part.start, part.stop) for part in piece)


class Collector:
    """Puts weights, or what has their shape, together.

    Args:
        ranks: of `plan_ranks`.
        world: all ranks.
        part: as for `find_owners`.
    """

    def __init__(self, ranks: Sequence[Mapping[str, ParameterShard]], world: Group, part: Part) -> None:
        self._world = world
        self._own = {name: part(shard) for name, shard in ranks[world.index].items()}
        self._owners = find_owners(ranks, part)
        self._shapes = {name: shard.full_shape for shards in ranks for name, shard in shards.items()}

    def collect(self, values: Mapping[str, Array], names: Iterable[str] | None = None) -> dict[str, Array]:
        """Whole tensors on rank 0, nothing on the others; one at a time goes around. All ranks call this alike.

        Args:
            values: this rank's pieces.
            names: which weights; all if None.
        """
        whole = {}
        for name in self._owners if names is None else names:
            full = np.zeros(self._shapes[name], np.float32)
            if name in values:
                piece = self._own[name]
                if self._owners[name][_box(piece)] == self._world.index:  # copies count once
                    full[piece] = values[name]
            total = full if self._world.is_alone else transport().all_reduce(self._world)(Tensor(full)).asnumpy()
            if self._world.index == 0:
                whole[name] = total.copy()  # the memory is used again once the tensor is gone
        return whole
