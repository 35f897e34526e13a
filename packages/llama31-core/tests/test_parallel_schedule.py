"""Pipeline schedules: every stage's actions, played with sends that wait for their receivers."""

from __future__ import annotations

from collections import Counter

import pytest

from llama31_core.errors import ConfigError
from llama31_core.parallel.schedule import Action, PipelinePlan, plan_pipeline

SHAPES = [(1, 1, 3), (2, 1, 2), (2, 1, 4), (4, 1, 8), (4, 2, 8), (8, 1, 256), (2, 2, 4), (16, 2, 32)]


def meets(one: Action, other: Action, stage: int) -> bool:
    """Whether two actions are the two ends of one transfer."""
    what = (one.part, one.micro_batch, one.is_gradient) == (other.part, other.micro_batch, other.is_gradient)
    return what and other.peer == stage and {one.kind, other.kind} == {"send", "receive"}


def play(plan: PipelinePlan) -> list[tuple[str, int, int]]:
    """What is computed, in an order in which it can happen; a send and its receive happen at once or not at all."""
    stages = len(plan.actions)
    place = [0] * stages
    computed: list[tuple[str, int, int]] = []

    def current(stage: int) -> Action | None:
        own = plan.actions[stage]
        return own[place[stage]] if place[stage] < len(own) else None

    while any(current(stage) for stage in range(stages)):
        before = list(place)
        for stage in range(stages):
            action = current(stage)
            if action is None:
                continue
            if action.kind in ("forward", "backward"):
                computed.append((action.kind, action.part, action.micro_batch))
                place[stage] += 1
                continue
            other = current(action.peer)
            if other is not None and meets(action, other, stage):
                place[stage] += 1
                place[action.peer] += 1
        assert place != before, f"all stages wait: {[current(stage) for stage in range(stages)]}"
    return computed


@pytest.mark.parametrize(("pp", "interleave", "micro_batches"), SHAPES)
def test_everything_is_computed_once_and_in_order(pp: int, interleave: int, micro_batches: int) -> None:
    plan = plan_pipeline(pp, interleave, micro_batches)
    computed = play(plan)
    parts = pp * interleave
    kinds = ("forward", "backward")
    wanted = {(k, part, m) for k in kinds for part in range(parts) for m in range(micro_batches)}
    assert Counter(computed) == Counter(wanted)
    when = {what: number for number, what in enumerate(computed)}
    for kind, part, micro_batch in wanted:
        if kind == "forward" and part:
            assert when["forward", part - 1, micro_batch] < when[kind, part, micro_batch]
        if kind == "backward":
            after = ("backward", part + 1, micro_batch) if part + 1 < parts else ("forward", part, micro_batch)
            assert when[after] < when[kind, part, micro_batch]


@pytest.mark.parametrize(("pp", "interleave", "micro_batches"), SHAPES)
def test_bubble_and_activations_are_those_of_the_papers(pp: int, interleave: int, micro_batches: int) -> None:
    plan = plan_pipeline(pp, interleave, micro_batches)
    assert plan.bubble == pytest.approx((pp - 1) / (interleave * micro_batches + pp - 1))
    if interleave == 1:  # stage s holds no more than pp - s micro-batches, however many there are
        assert plan.peak_in_flight == tuple(min(pp - stage, micro_batches) for stage in range(pp))


def test_a_pipeline_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch_num=3 is less than pp=4.*allowed is >= 4"):
        plan_pipeline(4, 1, 3)
    with pytest.raises(ConfigError, match=r"no multiple of pp=4.*\[4, 8\]"):
        plan_pipeline(4, 2, 6)
