"""Bytes on one rank of a stage: sizes in, what weights, gradients, optimiser, activations and caches take out.

Parameters are counted from the layout table, shard by shard. Letters: N tokens of a micro-batch on a rank, T of a
sequence, E = dim, H query heads, K key-value heads, D width of a head, F = ffn_dim, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.plan.counts import count_numbers
from llama31_core.plan.hardware import Device
from llama31_core.plan.workload import NumberBytes, PredictWorkload, TrainWorkload
from llama31_core.training.pieces import chunk_size, query_key_pairs

_NARROW, _HEADS, _WIDE, _SCORES = 8, 6, 8, 8


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by what they are for, at the moment of a step at which they are most.

    Attributes:
        parts: name to bytes.
        moment: the beginning of the backward pass, or its end.
    """

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def training_memory(work: TrainWorkload, device: Device, stage: int) -> MemoryUse:
    """Of a rank of a pipeline stage.

    With one micro-batch a layer's gradients come as its activations go, so the two are never whole together; with more
    of them the gradients of the micro-batches before stay.
    """
    numbers = count_numbers(work.config, work.parallel, stage)
    number = NumberBytes.on(device, work.param_type, work.compute_type)
    layers = len(work.parallel.stage_layers(work.config)[stage])
    gradients = (numbers.owned if work.parallel.shard_gradients else numbers.all) * number.weights
    outside = numbers.outside * number.weights
    kept = kept_bytes(work, number)
    fixed = {
        "weights": numbers.weight_bytes(number.weights),
        "optimiser": numbers.owned * number.moments,
        "average": numbers.all * 4 * work.has_average,
    }
    if not device.is_fused:  # AdamW's graphs are built with moments of their own, for a layer and what is outside
        fixed["optimiser"] += (numbers.outside + (numbers.all - numbers.outside) // layers) * number.moments
    in_flight = kept * _layers_in_flight(work, stage)
    accumulates = work.micro_batches > 1
    beginning = {
        "gradients": gradients if accumulates else outside,
        "activations": in_flight,
        "work": max(_head_bytes(work, stage), _layer_bytes(work, device, number)),
    }
    end = {
        "gradients": gradients,
        "activations": in_flight - kept * (layers - 1),
        "work": _layer_bytes(work, device, number),
    }
    moment, changing = max(
        (("the beginning of the backward pass", beginning), ("the end of the backward pass", end)),
        key=lambda moment: sum(moment[1].values()),
    )
    return MemoryUse({name: size for name, size in (fixed | changing).items() if size}, moment)


def kept_bytes(work: TrainWorkload, number: NumberBytes) -> int:
    """What a layer keeps of a micro-batch for the backward pass: its input, and what `training.block` returns."""
    config, parallel = work.config, work.parallel
    narrow = config.dim // (parallel.tp if parallel.sequence_parallel else 1)
    heads = config.head_dim * (config.n_heads // parallel.tp)
    kv = config.head_dim * max(1, config.n_kv_heads // parallel.tp)
    wide = config.ffn_dim // parallel.tp
    each = narrow
    if work.recompute != "full":
        each += heads + 2 * kv + heads + narrow
    if work.recompute == "none":
        each += 2 * wide
    return work.tokens * each * number.activations


def prediction_memory(work: PredictWorkload, device: Device, stage: int) -> MemoryUse:
    """Of a rank of a stage of an engine."""
    config, parallel = work.config, work.parallel
    number = NumberBytes.on(device, work.param_type, work.compute_type)
    layers = len(parallel.stage_layers(config)[stage])
    rows = work.chunk_tokens + work.max_batch_size
    heads = config.head_dim * (config.n_heads + 2 * max(config.n_kv_heads, parallel.tp)) // parallel.tp
    widest = max(2 * config.dim + heads, 2 * config.dim + 3 * config.ffn_dim // parallel.tp)
    layer_work = rows * widest * number.activations
    if not device.is_fused:
        layer_work += 2 * 4 * work.chunk_tokens * work.seq_length * (config.n_heads // parallel.tp)
    logits = 4 * work.max_batch_size * config.vocab_size if stage == parallel.pp - 1 else 0
    return MemoryUse(
        {
            "weights": count_numbers(config, parallel, stage).weight_bytes(number.weights),
            "kv cache": cache_bytes_per_token(work, number, layers) * work.block_size * work.num_blocks,
            "work": max(layer_work, logits),
        },
        "a step with a chunk of a prompt",
    )


def cache_bytes_per_token(work: PredictWorkload, number: NumberBytes, layers: int) -> int:
    """Keys and values of a token in a rank's layers; ranks beyond the key-value heads hold copies."""
    heads = max(1, work.config.n_kv_heads // work.parallel.tp)
    return 2 * layers * heads * work.config.head_dim * number.activations


def _layers_in_flight(work: TrainWorkload, stage: int) -> int:
    """Layers times micro-batches whose activations a stage holds at most under 1F1B (Narayanan et al. 2021, 2.2)."""
    parallel = work.parallel
    layers = len(parallel.stage_layers(work.config)[stage])
    if parallel.interleave == 1:
        return layers * min(work.micro_batches, parallel.pp - stage)
    parts = (parallel.pp - stage - 1) * 2 + (parallel.interleave - 1) * parallel.pp + 1
    return -(-layers * min(work.micro_batches * parallel.interleave, parts) // parallel.interleave)


def _head_bytes(work: TrainWorkload, stage: int) -> int:
    """Logits of a chunk of tokens, their log-probabilities and gradients, float32, on the last stage."""
    if stage != work.parallel.pp - 1:
        return 0
    return 3 * 4 * chunk_size(work.config.vocab_size, work.tokens) * (work.config.vocab_size // work.parallel.tp)


def _layer_bytes(work: TrainWorkload, device: Device, number: NumberBytes) -> int:
    """What the backward pass of one layer has beside what is kept: what is computed again, and its gradients.

    Counted in values of a token: what is normed, gate, up, their product, heads, the gradients of all of these, and
    copies in another order of axes; where attention is not fused, as many values of every score, as no block of queries
    is let go before the layer's end. Measured by tools/bench/plan.py.
    """
    config, parallel = work.config, work.parallel
    heads = config.head_dim * (config.n_heads + 2 * max(config.n_kv_heads, parallel.tp)) // parallel.tp
    values = _NARROW * config.dim + _HEADS * heads + _WIDE * config.ffn_dim // parallel.tp
    size = work.tokens * values * number.activations
    if device.is_fused:
        return size
    return size + _SCORES * 4 * work.batch_size * (config.n_heads // parallel.tp) * query_key_pairs(work.seq_length)
