"""The best layouts of a training step over N devices: every mesh, recomputation and micro-batch is planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.sequence import check_sequence
from llama31_core.plan.hardware import Device
from llama31_core.plan.training import TrainingPlan, plan_training
from llama31_core.plan.workload import TrainWorkload
from llama31_core.run_config.training import RecomputePolicy

POLICIES: tuple[RecomputePolicy, ...] = ("none", "select", "full")


@dataclass
class SearchResult:
    """What was found.

    Attributes:
        plans: that fit, the fastest first.
        dropped: how many layouts were left out, by reason.
        closest: of those that do not fit into memory, the one that lacks least.
    """

    plans: list[TrainingPlan] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    closest: TrainingPlan | None = None

    @property
    def num_layouts(self) -> int:
        """That were looked at."""
        return len(self.plans) + sum(self.dropped.values())


def search_layouts(work: TrainWorkload, device: Device, num_devices: int) -> SearchResult:
    """Plan the step, with as many sequences, over all layouts of `num_devices`.

    Where tp splits layers, sequence parallelism splits what is between them; where there are replicas, the optimiser's
    state is split over them. Both save memory and send no more bytes than a sum would.
    """
    result = SearchResult()
    sequences = work.batch_size * work.micro_batches * work.parallel.dp
    for parallel in _meshes(num_devices):
        reason = _misfit(work.config, parallel, work.seq_length)
        if reason:
            result.dropped[reason] += 1
            continue
        each, rest = divmod(sequences, parallel.dp)
        if rest:
            result.dropped[f"dp does not divide the {sequences} sequences of a step"] += 1
            continue
        for batch_size in (size for size in range(1, each + 1) if each % size == 0 and size & (size - 1) == 0):
            for recompute in POLICIES:
                _consider(
                    replace(
                        work,
                        parallel=parallel,
                        batch_size=batch_size,
                        micro_batches=each // batch_size,
                        recompute=recompute,
                    ),
                    device,
                    result,
                )
    result.plans.sort(key=lambda plan: plan.seconds)
    return result


def _consider(work: TrainWorkload, device: Device, result: SearchResult) -> None:
    if work.micro_batches < work.parallel.pp:
        result.dropped["fewer micro-batches than pipeline stages"] += 1
        return
    last = work.parallel.pp - 1
    # The first stage holds most layers and activations, the last one computes the head: none between needs more.
    plan = plan_training(work, device, sorted({0, last}))
    if plan.fits:
        result.plans.append(plan)
        return
    result.dropped["more memory than a device has"] += 1
    if result.closest is None or plan.largest.memory.total < result.closest.largest.memory.total:
        result.closest = plan


def _meshes(num_devices: int) -> Iterator[ParallelConfig]:
    for tp in _divisors(num_devices):
        for pp in _divisors(num_devices // tp):
            for cp in _divisors(num_devices // tp // pp):
                dp = num_devices // tp // pp // cp
                yield ParallelConfig(dp=dp, cp=cp, tp=tp, pp=pp, sequence_parallel=tp > 1, shard_optimizer=dp > 1)


def _misfit(config: ModelConfig, parallel: ParallelConfig, seq_length: int) -> str | None:
    """Why a mesh is none for the model."""
    if parallel.pp > config.n_layers:
        return "more pipeline stages than layers"
    try:
        check_sequence(parallel, seq_length)
    except ConfigError:
        return "seq_length is no multiple of the parts of a sequence"
    try:
        parallel.check(config)
    except ConfigError:
        return "tp does not divide the heads, the feed-forward width or the vocabulary"
    return None


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
