"""Which ranks hold shares of a parameter's gradient, or copies of it: the layout table in, groups to sum over out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor

from llama31_core.checkpoint.names import EMBEDDING, NORM_OUT
from llama31_core.config import ModelConfig
from llama31_core.parallel.groups import Group, Groups
from llama31_core.parallel.layout import ParameterShard, split_axes, stages_of
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.transport import transport

_HALF = 4096.0


@dataclass(frozen=True)
class GradientPlan:
    """What is done to a rank's gradient of one parameter, once all micro-batches are through.

    Attributes:
        sums_tp: the tp ranks saw different tokens (sequence parallel) and hold the same parameter.
        kv_copies: so many neighbours hold the same key-value head, each for its own queries.
        sums_ends: a tied embedding, used by the first stage and by the last.
        is_scattered: the sum over dp is wanted in parts along the first axis, one for each rank.
        shape: of what the optimiser takes.
        num_holders: ranks of the mesh that end up with the same piece of the gradient; in the norm it counts once.
    """

    sums_tp: bool
    kv_copies: int
    sums_ends: bool
    is_scattered: bool
    shape: tuple[int, ...]
    num_holders: int


def plan_gradient(shard: ParameterShard, config: ModelConfig, parallel: ParallelConfig) -> GradientPlan:
    """The plan for a parameter."""
    axes = split_axes(shard.name)
    is_whole = all(parts == 1 for parts in shard.parts) and "kv" not in axes
    sees_some_tokens = parallel.sequence_parallel and parallel.tp > 1 and is_whole and shard.name != NORM_OUT
    sums_ends = shard.name == EMBEDDING and len(stages_of(shard.name, config, parallel)) > 1
    is_scattered = shard.optimizer_slices != shard.slices
    holders = (parallel.tp if is_whole else shard.copies) * (2 if sums_ends else 1) * parallel.cp
    holders *= 1 if is_scattered else parallel.dp
    shape = tuple(part.stop - part.start for part in shard.optimizer_slices)
    return GradientPlan(sees_some_tokens, shard.copies, sums_ends, is_scattered, shape, holders)


class MeshReduction:
    """The sums that a training step takes over a mesh (a `training.reduction.Reduction`).

    Args:
        groups: of the rank.
        plans: by the name of the weight.
    """

    def __init__(self, groups: Groups, plans: Mapping[str, GradientPlan]) -> None:
        self._groups, self._plans = groups, plans
        self._dp, self._world = groups.axis("dp"), groups.world()

    def sum_number(self, value: float) -> float:
        """Over dp; what the ranks of a replica have is summed over cp and pp where it comes from."""
        return sum_numbers(value, self._dp)

    def sum_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Over everything that holds a share of a gradient; of what the optimiser splits, the rank's rows."""
        sums = {}
        for name, plan in self._plans.items():
            if name not in gradients:
                continue
            gradient = self.scatter(name, gradients[name])
            if not plan.is_scattered and not self._dp.is_alone:
                gradient = transport().all_reduce(self._dp)(gradient)
            sums[name] = self._sum_within(gradient, plan)
        return sums

    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        """The rank's rows of the sum over dp, if the optimiser splits this weight and it was not done before."""
        plan = self._plans[name]
        if not plan.is_scattered or gradient.shape == plan.shape:
            return gradient
        return transport().reduce_scatter(self._dp)(gradient)

    def _sum_within(self, gradient: Tensor, plan: GradientPlan) -> Tensor:
        """Over ranks that hold the same weight, or a copy, and did other work with it."""
        wanted = [self._groups.axis("cp")]
        if plan.sums_tp:
            wanted.append(self._groups.axis("tp"))
        if plan.kv_copies > 1:
            wanted.append(self._groups.kv_copies())
        if plan.sums_ends:
            wanted.append(self._groups.ends())
        for group in wanted:
            if not group.is_alone:
                gradient = transport().all_reduce(group)(gradient)
        return gradient

    def sum_squares(self, value: float) -> float:
        """Over all ranks."""
        return sum_numbers(value, self._world)


def sum_numbers(value: float, group: Group) -> float:
    """The sum over a group, exact for whole numbers below 2^36: what goes around is float32, so in two halves."""
    if group.is_alone:
        return value
    halves = (value // _HALF, value % _HALF) if math.isfinite(value) else (value, 0.0)
    high, low = transport().all_reduce(group)(Tensor(halves, ms.float32)).asnumpy().tolist()
    return float(high * _HALF + low)
