"""AdamW over a mesh: moments of a rank's rows alone (ZeRO-1; Rajbhandari et al. 2020), whole weights on every rank.

A rank updates a copy of its dp share of each weight's rows and gathers the others'. Weights whose rows do not divide
are updated by every rank alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mindspore import Parameter, Tensor

from llama31_core.parallel.gradient_plan import GradientPlan
from llama31_core.parallel.groups import Groups
from llama31_core.parallel.layout import ParameterShard
from llama31_core.parallel.shared_memory import eager_transport
from llama31_core.training.optim import AdamW
from llama31_core.training.weights import TrainedWeights, layer_name


class OwnRows:
    """The rows of loaded weights that a rank updates (a `training.optim.Updatable`)."""

    def __init__(self, weights: TrainedWeights, shards: Mapping[str, ParameterShard]) -> None:
        self._weights, self._shards = weights, shards
        self.layer_indices: Sequence[int] = weights.layer_indices
        self._split = {name for name in weights.names() if shards[name].optimizer_slices != shards[name].slices}
        self._rows = {name: Tensor(weights.tensors[name].asnumpy()[self._place(name)].copy()) for name in self._split}
        first = self.layer_indices[0]
        self.block_parameters = {
            name: self._parameter(name, layer_name(name, first), parameter)
            for name, parameter in weights.block_parameters.items()
        }
        self.outer_parameters = {
            name: self._parameter(name, name, parameter) for name, parameter in weights.outer_parameters.items()
        }

    def _parameter(self, name: str, example: str, whole: Parameter) -> Parameter:
        if example not in self._split:
            return whole
        rows = Parameter(self._rows[example], name=name, requires_grad=whole.requires_grad)
        rows.set_data(self._rows[example])  # not a copy of them
        return rows

    def _place(self, name: str) -> slice:
        shard = self._shards[name]
        first = shard.slices[0].start
        return slice(shard.optimizer_slices[0].start - first, shard.optimizer_slices[0].stop - first)

    @property
    def split(self) -> list[str]:
        """Weights of which the rank updates some rows."""
        return [name for name in self.names() if name in self._split]

    def names(self) -> list[str]:
        """As of the weights."""
        return self._weights.names()

    def is_trained(self, name: str) -> bool:
        """As of the weights."""
        return self._weights.is_trained(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the rows."""
        return tuple(part.stop - part.start for part in self._shards[name].optimizer_slices)

    def use_layer(self, index: int) -> None:
        """Point the parameters at the rows of this layer."""
        self._weights.use_layer(index)
        for name, parameter in self.block_parameters.items():
            own = layer_name(name, index)
            if own in self._split:
                parameter.set_data(self._rows[own])

    def rows(self, name: str) -> Tensor:
        """The rank's rows of a weight."""
        return self._rows[name]


class MeshAdamW(AdamW):
    """AdamW of one rank of a mesh; arguments beside the rank's are those of `AdamW`."""

    def __init__(
        self,
        weights: TrainedWeights,
        shards: Mapping[str, ParameterShard],
        plans: Mapping[str, GradientPlan],
        groups: Groups,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        self._own, self._all, self._plans, self._dp = OwnRows(weights, shards), weights, plans, groups.axis("dp")
        super().__init__(self._own, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def square_sum(self, gradients: Mapping[str, Tensor]) -> float:
        """This rank's share in the sum of squares: what several ranks hold alike counts once in the sum over all."""
        total = 0.0
        for _, names in self._groups():
            for holders in sorted({self._plans[name].num_holders for name in names}):
                alike = [gradients[name] for name in names if self._plans[name].num_holders == holders]
                total += float(self._square_sum(*alike)) / holders
        return total

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float) -> None:
        """Update this rank's rows, and take those of the others."""
        super().step(gradients, learning_rate, scale)
        for name in self._own.split:
            if self._own.is_trained(name):
                self._all.replace(name, eager_transport(self._dp).all_gather(self._dp)(self._own.rows(name)))
