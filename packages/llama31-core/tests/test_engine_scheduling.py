"""Who runs when: priorities, no starvation, the queue delay, several prompts a step, swapping, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, RequestError
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.sum_runner import SumRunner

VOCAB = 101
CONFIG = ModelConfig.build(
    "test", vocab_size=VOCAB, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8, max_seq_len=64, eos_token_ids=(0,)
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def build(num_blocks: int = 16, num_host_blocks: int = 0, **options: Any) -> tuple[Engine, SumRunner, Clock]:
    clock, runner = Clock(), SumRunner(VOCAB, num_blocks, 4, num_host_blocks)
    return Engine(CONFIG, runner, EngineOptions(**options), clock=clock), runner, clock


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)


def order_of_ends(engine: Engine) -> list[str]:
    ended = []
    while engine.has_unfinished():
        ended += [output.request_id for output in engine.step() if output.finish_reason is not None]
    return ended


def test_a_lower_priority_number_goes_first_and_equals_as_they_came() -> None:
    engine, _, _ = build(max_batch_size=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        engine.add(name, [1, 2], tokens(3), priority=priority)
    assert order_of_ends(engine) == ["d", "b", "e", "a", "c"]


def test_a_more_urgent_request_takes_the_place_of_a_running_one() -> None:
    engine, _, _ = build(max_batch_size=1)
    engine.add("slow", [1, 2], tokens(9), priority=1)
    engine.step()
    engine.add("urgent", [3], tokens(2))
    assert order_of_ends(engine) == ["urgent", "slow"]
    assert engine.num_preemptions == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.floats(0.5, 3), st.integers(8, 12))
def test_no_stream_of_urgent_requests_starves_another(
    priority: int, max_batch_size: int, step_s: float, num_blocks: int
) -> None:
    """Once `priority` steps have gone by, whatever comes is less urgent: what came before is all that can go first."""
    engine, _, clock = build(num_blocks, max_batch_size=max_batch_size, priority_step_s=step_s, max_seq_len=32)
    engine.add("patient", [1, 2, 3], tokens(4), priority=priority)
    ahead, served = 0, []
    for number in range(2000):
        if clock.now_s <= priority * step_s:
            ahead += 1
        engine.add(str(number), [1 + number % 100, 5], tokens(3))  # one more each second, for ever
        clock.now_s += 1
        for _ in range(4 if max_batch_size == 1 else 2):  # what the machine can just keep up with
            served += [output.request_id for output in engine.step() if output.finish_reason is not None]
        if "patient" in served:
            break
    assert "patient" in served
    assert served.index("patient") <= ahead + max_batch_size


def test_the_most_urgent_request_is_never_preempted_by_the_least() -> None:
    engine, _, _ = build(8, max_batch_size=8)
    for name in "abcdef":
        engine.add(name, [1, 2, 3], tokens(20))
    assert order_of_ends(engine)[0] == "a"
    assert engine.num_preemptions > 0


def test_new_requests_wait_for_each_other_but_not_longer_than_the_delay() -> None:
    engine, runner, clock = build(max_queue_delay_s=0.5, max_prefill_batch_size=3)
    engine.add("a", [1, 2], tokens(2))
    assert engine.step() == []
    assert engine.gathering_s() == 0.5
    clock.now_s = 0.4
    engine.add("b", [3, 4], tokens(2))
    assert engine.step() == []
    assert engine.gathering_s() == pytest.approx(0.1)
    clock.now_s = 0.5
    assert [output.request_id for output in engine.step()] == ["a", "b"]
    assert runner.num_calls == 1


@pytest.mark.parametrize("sizes", [[3, 3, 3], [6, 7]])
def test_a_full_batch_of_prompts_does_not_wait(sizes: list[int]) -> None:
    engine, _, _ = build(max_queue_delay_s=0.5, max_prefill_batch_size=3, max_prefill_tokens=12)
    for index, size in enumerate(sizes):
        engine.add(str(index), [5] * size, tokens(1))
    assert engine.gathering_s() == 0
    assert engine.step()


def test_generate_does_not_wait_for_others() -> None:
    engine, runner, _ = build(max_queue_delay_s=1e9)
    engine.generate([[1, 2]], tokens(3))
    assert runner.num_calls == 3


def test_one_step_prefills_several_prompts_up_to_the_budget() -> None:
    engine, runner, _ = build(max_prefill_tokens=10)
    for name, size in (("a", 4), ("b", 4), ("c", 4)):
        engine.add(name, [ord(name)] * size, tokens(5))
    assert [output.request_id for output in engine.step()] == ["a", "b"]  # two tokens of c
    assert runner.num_rows == 3
    assert sorted(output.request_id for output in engine.step()) == ["a", "b", "c"]


def test_a_step_prefills_no_more_prompts_than_allowed() -> None:
    engine, _, _ = build(max_prefill_batch_size=2)
    for name in "abc":
        engine.add(name, [ord(name)] * 4, tokens(5))
    assert [output.request_id for output in engine.step()] == ["a", "b"]
    assert sorted(output.request_id for output in engine.step()) == ["a", "b", "c"]


def completions(num_host_blocks: int) -> tuple[list[list[int]], Engine]:
    engine, _, _ = build(8, num_host_blocks, max_batch_size=8)
    done = engine.generate([[1, 2, 3 + index] for index in range(6)], tokens(20))
    return [completion.token_ids for completion in done], engine


def test_a_swapped_sequence_goes_on_where_it_was_and_is_not_computed_again() -> None:
    recomputed, without_host = completions(0)
    swapped, with_host = completions(64)
    assert swapped == recomputed
    stats = with_host.stats()
    assert stats.num_swapped_out == stats.num_swapped_in == stats.num_preemptions > 0
    assert stats.num_prefill_tokens == 18  # each prompt once
    assert without_host.stats().num_swapped_out == 0
    assert without_host.stats().num_prefill_tokens > 18
    assert (with_host.num_free_blocks, stats.num_free_host_blocks) == (8, 64)


def test_a_full_host_falls_back_to_computing_again() -> None:
    few, engine = completions(2)
    assert few == completions(0)[0]
    stats = engine.stats()
    assert 0 < stats.num_swapped_out < stats.num_preemptions


@pytest.mark.parametrize(
    ("options", "prompt", "params", "message"),
    [
        ({"max_prompt_tokens": 3}, [1] * 4, tokens(1), "the prompt has 4 tokens, allowed are 3"),
        ({"max_output_tokens": 3}, [1], tokens(4), "max_tokens is 4, allowed are 3"),
        ({"max_batch_size": 2}, [1], SamplingParams(n=3), "n is 3, a batch has 2 places"),
        ({}, [1] * 9, SamplingParams(max_tokens=40, temperature=0, num_beams=4), "4 beams of 9 .* need 46 blocks"),
    ],
)
def test_what_a_request_may_not_ask_is_refused(
    options: dict[str, Any], prompt: list[int], params: SamplingParams, message: str
) -> None:
    engine, _, _ = build(**options)
    with pytest.raises(RequestError, match=message):
        engine.add("x", prompt, params)
    assert not engine.has_unfinished()


def test_max_tokens_none_is_what_the_limit_allows() -> None:
    engine, _, _ = build(max_output_tokens=5)
    [completion] = engine.generate([[1]], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    assert len(completion.token_ids) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0, allowed is an integer >= 1"),
        ({"max_batch_size": True}, "max_batch_size is True"),
        ({"max_queue_delay_s": -1}, "max_queue_delay_s is -1, allowed is a number >= 0"),
        ({"num_blocks": 3, "cache_memory_bytes": 5}, "both say how large the cache is"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize("seed", [9, 11, 14, 17])
def test_beams_that_made_room_come_back_into_a_cache_that_just_holds_them(seed: int) -> None:
    """Six beams that do not share their beginning need more blocks than there are, and would wait for ever."""
    prompts = np.random.default_rng(seed).integers(1, 90, (3, 20)).tolist()
    engine = Engine(CONFIG, SumRunner(VOCAB, 23, 4, spread=0.3), EngineOptions(max_batch_size=16))
    params = SamplingParams(12, temperature=0, num_beams=6, n=6, ignore_eos=True, early_stopping="never")
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, params)
    for _ in range(500):
        engine.step()
    assert not engine.has_unfinished()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([0, 2]),
)
def test_prompts_hold_up_running_requests_for_no_more_than_one_chunk(
    prompts: list[int], max_prefill_tokens: int, max_prefill_batch_size: int, num_speculative_tokens: int
) -> None:
    class Counting(SumRunner):
        num_tokens = 0

        def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
            self.num_tokens += sum(map(len, batch.token_ids))
            return super().forward(batch)

    runner = Counting(VOCAB, 100, 4)
    options = EngineOptions(
        max_prefill_tokens=max_prefill_tokens,
        max_prefill_batch_size=max_prefill_batch_size,
        num_speculative_tokens=num_speculative_tokens,
    )
    engine = Engine(CONFIG, runner, options)
    running = set("abc")
    for name in running:
        engine.add(name, [ord(name)], tokens(60))
    while any(engine._execution.groups[name].sequences[0].num_cached == 0 for name in running):
        engine.step()
    for index, length in enumerate(prompts):
        engine.add(str(index), [1 + index] * length, tokens(1))
    while engine.has_unfinished() and running:
        runner.num_tokens = 0
        outputs = engine.step()
        assert running <= {output.request_id for output in outputs}
        assert runner.num_tokens <= max_prefill_tokens + len(running) * (1 + num_speculative_tokens)
        running -= {output.request_id for output in outputs if output.finish_reason is not None}
