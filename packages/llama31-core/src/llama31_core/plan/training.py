"""A training step: sizes and a device in; memory, traffic, bubble, time, tokens/s and MFU out. Nothing overlaps:
products, what only moves memory, and collectives are taken one after another, so real programs may be faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llama31_core.plan.counts import count_numbers
from llama31_core.plan.hardware import Device
from llama31_core.plan.memory import MemoryUse, training_memory
from llama31_core.plan.traffic import Traffic, step_traffic
from llama31_core.plan.workload import NumberBytes, TrainWorkload
from llama31_core.training.flops import StepFlops
from llama31_core.training.pieces import query_key_pairs


@dataclass(frozen=True)
class StagePlan:
    """A rank of one pipeline stage.

    Attributes:
        micro_batch_s: seconds of a micro-batch forward and backward, by what takes them.
        step_s: seconds that come once a step.
    """

    stage: int
    layers: int
    memory: MemoryUse
    traffic: list[Traffic]
    micro_batch_s: dict[str, float]
    step_s: dict[str, float]


@dataclass(frozen=True)
class TrainingPlan:
    """A step on a device.

    Attributes:
        stages: a rank of each; the others of a stage are alike.
    """

    work: TrainWorkload
    device: Device
    stages: list[StagePlan]

    @property
    def largest(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def slowest(self) -> StagePlan:
        """The stage that all others wait for."""
        return max(self.stages, key=lambda stage: sum(stage.micro_batch_s.values()))

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.largest.memory.total <= self.device.usable_bytes

    @property
    def bubble(self) -> float:
        """Share of a step's time in which a stage waits for others (Narayanan et al. 2021, 2.2)."""
        waits = self.work.parallel.pp - 1
        return waits / (self.work.micro_batches * self.work.parallel.interleave + waits)

    @cached_property
    def flops_per_token(self) -> float:
        """Of the model, forward and backward: what is computed again counts not, pairs under the causal mask alone."""
        tokens = self.work.seq_length
        return StepFlops.of(self.work.config).count(tokens, tokens, tokens * (tokens + 1) // 2) / tokens

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        busy = self.work.micro_batches * sum(self.slowest.micro_batch_s.values())
        return busy / (1 - self.bubble) + max(sum(stage.step_s.values()) for stage in self.stages)

    @property
    def tokens_per_s_device(self) -> float:
        """Trained on."""
        return self.work.tokens_per_step / self.seconds / self.work.parallel.world_size

    @property
    def mfu(self) -> float:
        """Share of the device's rate (Chowdhery et al. 2022, appendix B)."""
        return self.tokens_per_s_device * self.flops_per_token / self.device.flops_per_s


def plan_training(work: TrainWorkload, device: Device, stages: Sequence[int] | None = None) -> TrainingPlan:
    """Plan a step.

    Args:
        stages: that are looked at; all if None.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    seen = range(work.parallel.pp) if stages is None else stages
    return TrainingPlan(work, device, [_stage(work, device, stage) for stage in seen])


def _stage(work: TrainWorkload, device: Device, stage: int) -> StagePlan:
    traffic = step_traffic(work, device, stage)
    micro_batch = _compute_seconds(work, device, stage)
    once: dict[str, float] = {"optimiser": _optimizer_seconds(work, device, stage)}
    for part in traffic:
        if part.is_per_micro_batch:
            micro_batch[part.axis] = micro_batch.get(part.axis, 0.0) + part.seconds / work.micro_batches
        else:
            once[part.axis] = once.get(part.axis, 0.0) + part.seconds
    layers = len(work.parallel.stage_layers(work.config)[stage])
    return StagePlan(stage, layers, training_memory(work, device, stage), traffic, micro_batch, once)


def _compute_seconds(work: TrainWorkload, device: Device, stage: int) -> dict[str, float]:
    """Of products, attention, and what reads and writes between them."""
    config, parallel, efficiency = work.config, work.parallel, device.efficiency
    layers = len(parallel.stage_layers(config)[stage])
    again = {"none": 0, "select": 0, "full": 1}[work.recompute]
    attention = (4 + 8 + 2 * device.is_fused + 4 * again) * layers * config.n_heads // parallel.tp * config.head_dim
    pairs = work.seq_length * (work.seq_length + 1) // 2 if device.is_fused else query_key_pairs(work.seq_length)
    number = NumberBytes.on(device, work.param_type, work.compute_type)
    moved = _moved_numbers(work) * (3 + again) * layers * number.activations
    return {
        "products": _product_flops(work, stage) * work.tokens / (device.flops_per_s * efficiency.products),
        "attention": attention * pairs * work.batch_size / parallel.cp / (device.flops_per_s * efficiency.attention),
        "memory": moved * work.tokens / (device.memory_bytes_per_s * efficiency.memory),
    }


def _product_flops(work: TrainWorkload, stage: int) -> float:
    """A rank's operations for a token: 6 for a weight, 2 more for one whose product is computed again."""
    numbers = count_numbers(work.config, work.parallel, stage)
    full = numbers.layer_matrices - numbers.down
    flops = 6 * numbers.layer_matrices + 2 * {"none": 0, "select": numbers.gate_and_up, "full": full}[work.recompute]
    if stage == work.parallel.pp - 1:
        flops += 6 * work.config.vocab_size * work.config.dim // work.parallel.tp
    return float(flops)


def _moved_numbers(work: TrainWorkload) -> float:
    """Read or written for a token of a layer between products, forward: two norms, two residuals, rotation, SwiGLU."""
    config, parallel = work.config, work.parallel
    narrow = config.dim / (parallel.tp if parallel.sequence_parallel else 1)
    heads = config.head_dim * (config.n_heads + max(config.n_kv_heads, parallel.tp)) / parallel.tp
    return 10 * narrow + 2 * heads + 3 * config.ffn_dim / parallel.tp


def _optimizer_seconds(work: TrainWorkload, device: Device, stage: int) -> float:
    """AdamW reads gradients, and reads and writes moments and weights."""
    number = NumberBytes.on(device, work.param_type, work.compute_type)
    moved = number.weights + 2 * number.moments + 2 * number.weights
    owned = count_numbers(work.config, work.parallel, stage).owned
    return owned * moved / (device.memory_bytes_per_s * device.efficiency.memory)
