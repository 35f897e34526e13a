"""An engine: sizes and a device in; memory, cache, and the speed of prompts and of decoding out.

Decoding reads every weight once a step, and the cache of every sequence; a prompt's chunk is products.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.plan.counts import count_numbers, stage_rank
from llama31_core.plan.hardware import Device
from llama31_core.plan.memory import MemoryUse, cache_bytes_per_token, prediction_memory
from llama31_core.plan.workload import NumberBytes, PredictWorkload

BATCHES = (1, 4, 16, 64)


@dataclass(frozen=True)
class PredictionPlan:
    """An engine on a device.

    Attributes:
        stages: memory of a rank of each.
        cache_tokens: that the cache holds.
        free_cache_tokens: that it could hold if it took all memory that is left.
        decode: batch size to tokens/s of all sequences, each with half of `seq_length` behind it.
        prefill_tokens_per_s: of one prompt, in chunks.
        flops_per_token: of a forward pass, without attention.
    """

    work: PredictWorkload
    device: Device
    stages: list[MemoryUse]
    cache_tokens: int
    free_cache_tokens: int
    decode: dict[int, float]
    prefill_tokens_per_s: float
    flops_per_token: float

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return max(memory.total for memory in self.stages) <= self.device.usable_bytes


def plan_prediction(work: PredictWorkload, device: Device) -> PredictionPlan:
    """Plan an engine.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    config = work.config
    stages = [prediction_memory(work, device, stage) for stage in range(work.parallel.pp)]
    held = work.block_size * work.num_blocks
    room = [device.usable_bytes - memory.total + memory.parts["kv cache"] for memory in stages]
    each = [memory.parts["kv cache"] / held for memory in stages]
    free = min(int(bytes_ / size) for bytes_, size in zip(room, each, strict=True))
    return PredictionPlan(
        work,
        device,
        stages,
        held,
        max(0, free),
        {batch: batch / _step_seconds(work, device, batch, work.seq_length // 2) for batch in BATCHES},
        work.chunk_tokens / _step_seconds(work, device, work.chunk_tokens, 0),
        2.0 * (config.num_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.dim)),
    )


def _step_seconds(work: PredictWorkload, device: Device, rows: int, context: int) -> float:
    """Of `rows` tokens through all stages, one after another; each row reads the cache of `context` tokens."""
    number = NumberBytes.on(device, work.param_type, work.compute_type)
    efficiency, parallel, total = device.efficiency, work.parallel, 0.0
    for stage in range(parallel.pp):
        numbers = count_numbers(work.config, parallel, stage)
        layers = len(parallel.stage_layers(work.config)[stage])
        head = work.config.vocab_size * work.config.dim // parallel.tp if stage == parallel.pp - 1 else 0
        read = (numbers.layer_matrices + head) * number.weights
        read += rows * context * cache_bytes_per_token(work, number, layers)
        flops = 2 * rows * (numbers.layer_matrices + head)
        total += max(
            read / (device.memory_bytes_per_s * efficiency.memory), flops / (device.flops_per_s * efficiency.products)
        )
        if parallel.tp > 1:
            size = rows * work.config.dim * number.activations
            sent = 2 * (parallel.tp - 1) / parallel.tp * size
            group = parallel.group("tp", stage_rank(parallel, stage))
            total += (2 * layers + 1) * (device.collective_latency_s + sent / device.bandwidth(group))
    return total
