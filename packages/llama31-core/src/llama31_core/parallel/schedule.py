"""When a pipeline stage computes and sends what: sizes in, every stage's list of actions out. Pure Python.

One forward, one backward in turn (1F1B; Narayanan et al. 2019, PipeDream), and with several parts a stage the
interleaved form (Narayanan et al. 2021, Megatron-LM, section 2.2). Sends and receives are placed by playing all stages
at once, a forward taking one unit of time and a backward two: any order of actions along that time is free of deadlock,
even where a send waits for its receiver, because all stages follow the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from llama31_core.errors import ConfigError

Kind = Literal["forward", "backward", "send", "receive"]
_TIME = {"forward": 1, "backward": 2}


@dataclass(frozen=True)
class Action:
    """One thing a stage does.

    Attributes:
        kind: compute a part's forward or backward, or hand over its result.
        part: of the model; part k is on stage k % pp. Of a send and a receive: the part the tensor goes into.
        micro_batch: which one.
        is_gradient: whether a send or receive carries the gradient of a part's input (of the part named above it).
        peer: the other stage of a send or receive.
    """

    kind: Kind
    part: int
    micro_batch: int
    is_gradient: bool = False
    peer: int = -1


@dataclass(frozen=True)
class PipelinePlan:
    """What every stage does, and how well it is used.

    Attributes:
        actions: of each stage, in order.
        bubble: share of the time that the busiest stage is idle, without the time of sends.
        peak_in_flight: for each stage the most micro-batches (of any part) that wait for their backward at once.
    """

    actions: tuple[tuple[Action, ...], ...]
    bubble: float
    peak_in_flight: tuple[int, ...]


def check_micro_batches(pp: int, interleave: int, micro_batches: int) -> None:
    """Raise ConfigError if a pipeline of this size cannot be filled."""
    if micro_batches < pp:
        raise ConfigError(
            f"micro_batch_num={micro_batches} is less than pp={pp}: stages would wait; allowed is >= {pp}"
        )
    if interleave > 1 and micro_batches % pp:
        near = [max(pp, micro_batches // pp * pp), (micro_batches // pp + 1) * pp]
        raise ConfigError(
            f"micro_batch_num={micro_batches} is no multiple of pp={pp}, which interleaved parts need; the nearest "
            f"that are: {near}"
        )


def compute_order(stage: int, pp: int, interleave: int, micro_batches: int) -> list[tuple[Kind, int, int]]:
    """(kind, part, micro-batch) of everything a stage computes."""
    total = micro_batches * interleave
    behind = pp - 1 - stage
    warmup = min(behind if interleave == 1 else 2 * behind + (interleave - 1) * pp, total)

    def place(index: int, is_forward: bool) -> tuple[Kind, int, int]:
        round_of_parts, within = divmod(index, pp * interleave)
        chunk = within // pp
        chunk = chunk if is_forward else interleave - 1 - chunk
        micro_batch = round_of_parts * pp + within % pp if interleave > 1 else index
        return "forward" if is_forward else "backward", chunk * pp + stage, micro_batch

    order = [place(index, True) for index in range(warmup)]
    for index in range(total - warmup):
        order += [place(warmup + index, True), place(index, False)]
    return order + [place(index, False) for index in range(total - warmup, total)]


@lru_cache(maxsize=16)
def plan_pipeline(pp: int, interleave: int, micro_batches: int) -> PipelinePlan:
    """Everything that every stage does.

    Raises:
        ConfigError: `micro_batches` cannot fill the pipeline.
    """
    check_micro_batches(pp, interleave, micro_batches)
    orders = [compute_order(stage, pp, interleave, micro_batches) for stage in range(pp)]
    starts, length = _play(orders, pp, interleave)
    timed: list[list[tuple[int, int, Action]]] = [[] for _ in range(pp)]
    for (kind, part, micro_batch), start in starts.items():
        timed[part % pp].append((start, 1, Action(kind, part, micro_batch)))
        target = part + 1 if kind == "forward" else part - 1
        if not 0 <= target < pp * interleave or target % pp == part % pp:
            continue
        when, is_gradient = start + _TIME[kind], kind == "backward"
        # Ties in time are broken alike on both sides: by the order of `starts`, which is that of time.
        for own, peer, what in ((part, target, "send"), (target, part, "receive")):
            action = Action(what, target, micro_batch, is_gradient, peer % pp)  # type: ignore[arg-type]
            timed[own % pp].append((when, 0, action))
    busy = max(sum(_TIME[kind] for kind, _, _ in order) for order in orders)
    actions = tuple(tuple(action for *_, action in sorted(own, key=lambda entry: entry[:2])) for own in timed)
    return PipelinePlan(actions, (length - busy) / length, tuple(_peak(order) for order in orders))


def _play(
    orders: list[list[tuple[Kind, int, int]]], pp: int, interleave: int
) -> tuple[dict[tuple[Kind, int, int], int], int]:
    """When each computation starts, in the order of time, and when all are done."""
    starts: dict[tuple[Kind, int, int], int] = {}
    ends: dict[tuple[Kind, int, int], int] = {}
    free, done = [0] * pp, [0] * pp
    last = pp * interleave - 1
    while any(place < len(order) for place, order in zip(done, orders, strict=True)):
        ready = []
        for stage, order in enumerate(orders):
            if done[stage] == len(order):
                continue
            kind, part, micro_batch = order[done[stage]]
            needed: tuple[Kind, int, int] | None
            if kind == "forward":
                needed = ("forward", part - 1, micro_batch) if part else None
            else:
                needed = ("backward", part + 1, micro_batch) if part < last else ("forward", part, micro_batch)
            if needed is None or needed in ends:
                ready.append((max(free[stage], ends.get(needed, 0) if needed else 0), stage))
        start, stage = min(ready)
        kind, part, micro_batch = orders[stage][done[stage]]
        starts[kind, part, micro_batch] = start
        free[stage] = ends[kind, part, micro_batch] = start + _TIME[kind]
        done[stage] += 1
    ordered = dict(sorted(starts.items(), key=lambda entry: (entry[1], entry[0])))
    return ordered, max(free)


def _peak(order: list[tuple[Kind, int, int]]) -> int:
    waiting = peak = 0
    for kind, _, _ in order:
        waiting += 1 if kind == "forward" else -1
        peak = max(peak, waiting)
    return peak
