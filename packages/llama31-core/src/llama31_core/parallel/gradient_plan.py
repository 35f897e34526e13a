"""Which ranks hold shares of a parameter's gradient, or copies of it: the layout table in, sums to be taken out. No
tensors: the trainer does what this says (gradients.py), and `plan` counts it."""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.checkpoint.names import EMBEDDING, NORM_OUT
from llama31_core.config import ModelConfig
from llama31_core.parallel.layout import ParameterShard, split_axes, stages_of
from llama31_core.parallel.mesh import ParallelConfig


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
