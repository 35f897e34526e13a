"""What training needs of a mesh, built for one rank: weights, sums over ranks, loss and gradients, optimiser, step."""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.backprop import MeshBackprop, build_weights
from llama31_core.parallel.gradient_plan import GradientPlan, plan_gradient
from llama31_core.parallel.gradients import MeshReduction
from llama31_core.parallel.groups import Groups
from llama31_core.parallel.layout import ParameterShard, plan_shards
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.zero import MeshAdamW
from llama31_core.precision import Precision
from llama31_core.training.block import Recompute
from llama31_core.training.head import Objective
from llama31_core.training.loss_scale import LossScale
from llama31_core.training.step import TrainStep
from llama31_core.training.weights import TrainedWeights

_FLOAT32 = Precision()


@dataclass(frozen=True)
class Replica:
    """One rank's.

    Attributes:
        shards: what the rank holds, by name.
        weights: to be loaded with `shards[name].slices` of each weight, before the optimiser is built.
    """

    groups: Groups
    shards: dict[str, ParameterShard]
    plans: dict[str, GradientPlan]
    weights: TrainedWeights
    reduction: MeshReduction

    def backprop(self, objective: Objective, recompute: Recompute) -> MeshBackprop:
        """Loss and gradients."""
        return MeshBackprop(self.weights, objective, recompute, self.groups, self.reduction)

    def optimizer(self, *, beta1: float, beta2: float, eps: float, weight_decay: float) -> MeshAdamW:
        """AdamW of the loaded weights."""
        numbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        return MeshAdamW(self.weights, self.shards, self.plans, self.groups, **numbers)

    def step(
        self,
        backprop: MeshBackprop,
        optimizer: MeshAdamW,
        *,
        max_norm: float | None,
        loss_scale: LossScale | None = None,
    ) -> TrainStep:
        """The training step, in which the ranks sum up."""
        return TrainStep(backprop, optimizer, max_norm=max_norm, loss_scale=loss_scale, reduction=self.reduction)


def check_trainable(config: ModelConfig, parallel: ParallelConfig) -> None:
    """See that a mesh can train a model, before anything is loaded.

    Raises:
        ConfigError: the model does not divide, or its head is an embedding that is not to be split.
    """
    parallel.check(config)
    if config.tie_word_embeddings and parallel.tp > 1 and not parallel.vocab_parallel:
        raise ConfigError(
            f"parallel_config.vocab_emb_dp is True and tp={parallel.tp}: the model's head is its embedding "
            "(tie_word_embeddings), which a split head splits too; set vocab_emb_dp=False"
        )


def build_replica(config: ModelConfig, parallel: ParallelConfig, rank: int, precision: Precision = _FLOAT32) -> Replica:
    """A rank's part, its weights still without values. All ranks call this at the same point of a program.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    check_trainable(config, parallel)
    shards = plan_shards(config, parallel, rank)
    groups = Groups(parallel, rank, config.n_kv_heads)
    plans = {name: plan_gradient(shard, config, parallel) for name, shard in shards.items()}
    return Replica(groups, shards, plans, build_weights(config, groups, precision), MeshReduction(groups, plans))
