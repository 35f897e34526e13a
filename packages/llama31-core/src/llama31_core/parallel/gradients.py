"""The sums over ranks of a training step: a rank's gradients and what to do with each in, summed ones out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mindspore as ms
from mindspore import Tensor

from llama31_core.parallel.gradient_plan import GradientPlan
from llama31_core.parallel.groups import Group, Groups
from llama31_core.parallel.shared_memory import eager_transport
from llama31_core.parallel.transport import transport

_HALF = 4096.0


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
                gradient = eager_transport(self._dp).all_reduce(self._dp)(gradient)
            sums[name] = self._sum_within(gradient, plan)
        return sums

    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        """The rank's rows of the sum over dp, if the optimiser splits this weight and it was not done before."""
        plan = self._plans[name]
        if not plan.is_scattered or gradient.shape == plan.shape:
            return gradient
        return eager_transport(self._dp).reduce_scatter(self._dp)(gradient)

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
                gradient = eager_transport(group).all_reduce(group)(gradient)
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
