"""What ranks send each other in a step: sizes in, bytes and numbers of collectives by axis of the mesh out.

A collective over n ranks of a tensor of S bytes sends (n - 1) / n * S from every rank if it gathers or scatters, twice
that if it sums for all (rings: Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.plan.counts import stage_rank
from llama31_core.plan.gradient_sums import count_sums
from llama31_core.plan.hardware import Device
from llama31_core.plan.workload import NumberBytes, TrainWorkload
from llama31_core.training.pieces import chunk_size

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Of one axis.

    Attributes:
        axis: of the mesh, or what of it: sp is tp with sequence parallelism, zero is dp with a split optimiser.
        what: is sent.
        bytes_per_step: that a rank sends.
        count: collectives of a step.
        seconds: that they take, if nothing else goes on meanwhile.
        is_per_micro_batch: they wait within a micro-batch; others come once a step.
    """

    axis: str
    what: str
    bytes_per_step: float
    count: int
    seconds: float
    is_per_micro_batch: bool


def step_traffic(work: TrainWorkload, device: Device, stage: int) -> list[Traffic]:
    """Of a rank of a pipeline stage."""
    number = NumberBytes.on(device, work.param_type, work.compute_type)
    found = [
        _within_layers(work, device, number, stage),
        _ring(work, device, number, stage),
        _between_stages(work, device, number, stage),
        *_over_gradients(work, device, number, stage),
    ]
    return [traffic for traffic in found if traffic is not None and traffic.count]


def _within_layers(work: TrainWorkload, device: Device, number: NumberBytes, stage: int) -> Traffic | None:
    """What split layers sum up: two products forward and two inputs' gradients backward, one product more if whole
    layers are computed again. With sequence parallelism each sum is a gather and a scatter, but that the product's is
    then a scatter alone, and gathered inputs are gathered again for the weights' gradients."""
    parallel = work.parallel
    if parallel.tp == 1:
        return None
    is_first, is_last, again = stage == 0, stage == parallel.pp - 1, work.recompute == "full"
    layers = len(parallel.stage_layers(work.config)[stage])
    size = work.tokens * work.config.dim * number.activations
    if parallel.sequence_parallel:
        count = layers * (10 + again) + 2 * (is_first and parallel.vocab_parallel) + is_last
        moved = count * size
    else:
        count = layers * (4 + again) + (is_first and parallel.vocab_parallel)
        moved = 2 * count * size
    if is_last:  # of each chunk of the head its input's gradient, and three numbers a token: see parallel/vocabulary.py
        chunk = chunk_size(work.config.vocab_size, work.tokens)
        chunks = -(-work.tokens // chunk)
        count += 4 * chunks
        moved += 2 * chunks * chunk * (work.config.dim * number.activations + 3 * _FLOAT32_BYTES)
    sent = moved * (parallel.tp - 1) / parallel.tp * work.micro_batches
    count *= work.micro_batches
    axis, what = ("sp", "gathers and scatters in layers") if parallel.sequence_parallel else ("tp", "sums in layers")
    group = parallel.group("tp", stage_rank(parallel, stage))
    return Traffic(axis, what, sent, count, _seconds(device, group, sent, count), True)


def _ring(work: TrainWorkload, device: Device, number: NumberBytes, stage: int) -> Traffic | None:
    """Keys and values go round forward, again if whole layers are computed again, and backward; there keys alone go
    round before that, for the softmax, and the gradients with them and then home."""
    parallel, config = work.parallel, work.config
    if parallel.cp == 1:
        return None
    heads = max(1, config.n_kv_heads // parallel.tp)
    size = 2 * work.tokens * heads * config.head_dim * number.activations
    layers = len(parallel.stage_layers(config)[stage])
    rounds, hops = 2 + (work.recompute == "full"), parallel.cp - 1
    count = layers * ((rounds + 1) * hops + parallel.cp) * work.micro_batches
    sent = layers * ((rounds + 0.5) * hops + parallel.cp) * size * work.micro_batches
    group = parallel.group("cp", stage_rank(parallel, stage))
    return Traffic("cp", "keys and values round the ring", sent, count, _seconds(device, group[:2], sent, count), True)


def _between_stages(work: TrainWorkload, device: Device, number: NumberBytes, stage: int) -> Traffic | None:
    parallel = work.parallel
    if parallel.pp == 1:
        return None
    parts = parallel.tp if parallel.sequence_parallel else 1
    size = work.tokens * work.config.dim * number.activations // parts
    last = parallel.pp - 1
    sends = (2 * parallel.interleave - (stage == 0) - (stage == last)) * work.micro_batches
    count = 2 * sends  # as many come in
    rank = stage_rank(parallel, stage)
    neighbour = stage_rank(parallel, stage + 1 if stage < last else stage - 1)
    sent = float(sends * size)
    seconds = _seconds(device, [rank, neighbour], sent, count)
    return Traffic("pp", "hidden states and their gradients", sent, count, seconds, True)


def _over_gradients(work: TrainWorkload, device: Device, number: NumberBytes, stage: int) -> list[Traffic]:
    """Sums of gradients, and with a split optimiser gathers of weights."""
    found = []
    for sums in count_sums(work.config, work.parallel, stage):
        times = work.micro_batches if sums.is_per_micro_batch else 1
        sent, count = float(sums.numbers * number.weights * times), sums.count * times
        seconds = _seconds(device, list(sums.ranks), sent, count)
        found.append(Traffic(sums.axis, sums.what, sent, count, seconds, sums.is_per_micro_batch))
    return found


def _seconds(device: Device, group: list[int], sent_bytes: float, count: int) -> float:
    return sent_bytes / device.bandwidth(group) + count * device.collective_latency_s
