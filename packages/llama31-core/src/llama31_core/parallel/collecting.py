"""Tensors that lie in parts on the ranks of a mesh, put together on rank 0: for saving a run as one process does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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


def find_owners(
    config: ModelConfig, parallel: ParallelConfig, part: Part
) -> dict[str, dict[tuple[tuple[int, int], ...], int]]:
    """For every weight the first rank that holds each of its pieces.

    Args:
        part: which piece of a weight is meant: what a rank holds, or what it updates.
    """
    owners: dict[str, dict[tuple[tuple[int, int], ...], int]] = {}
    for rank in range(parallel.world_size):
        for name, shard in plan_shards(config, parallel, rank).items():
            box = tuple((piece.start, piece.stop) for piece in part(shard))
            owners.setdefault(name, {}).setdefault(box, rank)
    return owners


class Collector:
    """Puts weights, or what has their shape, together.

    Args:
        world: all ranks.
        part: as for `find_owners`.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelConfig, world: Group, part: Part) -> None:
        self._world = world
        self._own = {name: part(shard) for name, shard in plan_shards(config, parallel, world.index).items()}
        self._owners = find_owners(config, parallel, part)
        self._shapes = {
            name: tuple(max(box[axis][1] for box in boxes) for axis in range(len(next(iter(boxes)))))
            for name, boxes in self._owners.items()
        }

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
                box = tuple((part.start, part.stop) for part in piece)
                if self._owners[name][box] == self._world.index:  # copies count once
                    full[piece] = values[name]
            total = full if self._world.is_alone else transport().all_reduce(self._world)(Tensor(full)).asnumpy()
            if self._world.index == 0:
                whole[name] = total.copy()  # the memory is used again once the tensor is gone
        return whole
