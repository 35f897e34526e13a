"""How many numbers of which kind a rank holds, summed over the layout table's shards; cached, for searches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from llama31_core.checkpoint.names import split_layer
from llama31_core.config import ModelConfig
from llama31_core.parallel.layout import ParameterShard, plan_shards
from llama31_core.parallel.mesh import Coordinates, ParallelConfig


@dataclass(frozen=True)
class RankNumbers:
    """Of one rank.

    Attributes:
        matrices, vectors: of the weights.
        outside: of the weights outside of layers.
        owned: whose optimiser state the rank keeps.
        layer_matrices: of the matrices in layers.
        gate_and_up, down: of these, w1 and w3, and w2.
    """

    matrices: int
    vectors: int
    outside: int
    owned: int
    layer_matrices: int
    gate_and_up: int
    down: int

    @property
    def all(self) -> int:
        """Matrices and vectors."""
        return self.matrices + self.vectors

    def weight_bytes(self, bytes_per_number: int) -> int:
        """Of all weights; vectors are float32."""
        return self.matrices * bytes_per_number + self.vectors * 4


@lru_cache(maxsize=4096)
def count_numbers(config: ModelConfig, parallel: ParallelConfig, stage: int) -> RankNumbers:
    """Of a rank of a pipeline stage; all ranks of a stage hold as much.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    shards = plan_shards(config, parallel, stage_rank(parallel, stage)).values()
    layers = [shard for shard in shards if split_layer(shard.name)[1] is not None]
    matrices = [shard for shard in layers if len(shard.shape) > 1]
    return RankNumbers(
        matrices=_sum([shard for shard in shards if len(shard.shape) > 1]),
        vectors=_sum([shard for shard in shards if len(shard.shape) == 1]),
        outside=_sum(list(shards)) - _sum(layers),
        owned=sum(prod(part.stop - part.start for part in shard.optimizer_slices) for shard in shards),
        layer_matrices=_sum(matrices),
        gate_and_up=_sum([s for s in matrices if s.name.endswith((".w1.weight", ".w3.weight"))]),
        down=_sum([s for s in matrices if s.name.endswith(".w2.weight")]),
    )


def stage_rank(parallel: ParallelConfig, stage: int) -> int:
    """The first rank of a stage."""
    return parallel.rank(Coordinates(stage, 0, 0, 0))


def _sum(shards: list[ParameterShard]) -> int:
    return sum(prod(shard.shape) for shard in shards)
