"""What the ranks of a mesh send each other for a step's gradients and weights, weight by weight as the trainer does it:
the plans of `parallel.gradient_plan` in, numbers sent and collectives out; cached, for searches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from llama31_core.checkpoint.names import split_layer
from llama31_core.config import ModelConfig
from llama31_core.parallel.gradient_plan import plan_gradient
from llama31_core.parallel.layout import ParameterShard, plan_shards
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.plan.counts import stage_rank


@dataclass(frozen=True)
class GradientSums:
    """Of one kind.

    Attributes:
        axis: as of `Traffic`.
        what: is sent.
        is_per_micro_batch: it comes after every micro-batch, else once a step.
        ranks: of the group.
        numbers: that a rank sends.
        count: collectives.
    """

    axis: str
    what: str
    is_per_micro_batch: bool
    ranks: tuple[int, ...]
    numbers: float
    count: int


@lru_cache(maxsize=4096)
def count_sums(config: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[GradientSums, ...]:
    """Of a rank of a pipeline stage."""
    numbers: Counter[tuple[str, str, bool, tuple[int, ...]]] = Counter()
    counts: Counter[tuple[str, str, bool, tuple[int, ...]]] = Counter()
    for shard in plan_shards(config, parallel, stage_rank(parallel, stage)).values():
        for axis, what, per_micro_batch, ranks, sent in _sums(shard, config, parallel, stage):
            if len(ranks) > 1:
                numbers[axis, what, per_micro_batch, ranks] += sent
                counts[axis, what, per_micro_batch, ranks] += 1
    return tuple(GradientSums(*kind, sent, counts[kind]) for kind, sent in numbers.items())


def _sums(
    shard: ParameterShard, config: ModelConfig, parallel: ParallelConfig, stage: int
) -> Iterator[tuple[str, str, bool, tuple[int, ...], int]]:
    """Axis, what, whether after every micro-batch, group, and numbers that a rank sends."""
    plan, rank = plan_gradient(shard, config, parallel), stage_rank(parallel, stage)
    whole, rows = prod(shard.shape), prod(plan.shape)
    dp, cp, tp, pp = (tuple(parallel.group(axis, rank)) for axis in ("dp", "cp", "tp", "pp"))
    if plan.is_scattered:
        every = parallel.shard_gradients and split_layer(shard.name)[1] is not None
        yield "dp", "scatters of gradients", every, dp, whole - rows
        yield "zero", "gathers of weights", False, dp, whole - rows
    else:
        yield "dp", "sums of gradients", False, dp, 2 * whole * (len(dp) - 1) // len(dp)
    yield "cp", "sums of gradients", False, cp, 2 * rows * (len(cp) - 1) // len(cp)
    if plan.sums_tp:
        yield "sp", "sums of whole weights' gradients", False, tp, 2 * rows * (len(tp) - 1) // len(tp)
    if plan.kv_copies > 1:
        copies = tp[: plan.kv_copies]
        yield "tp", "sums of copied heads' gradients", False, copies, 2 * rows * (len(copies) - 1) // len(copies)
    if plan.sums_ends:
        yield "pp", "sums of a tied embedding's gradient", False, (pp[0], pp[-1]), rows
