"""The engine with a runner whose logits can be worked out by hand: scheduling, preemption, errors, no leaked block."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, RequestError
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.request import StepOutput
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.sum_runner import SumRunner

VOCAB = 101
CONFIG = ModelConfig.build(
    "test", vocab_size=VOCAB, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8, max_seq_len=64, eos_token_ids=(0,)
)


def runner(num_blocks: int = 8, **more: Any) -> SumRunner:
    return SumRunner(VOCAB, num_blocks, **more)


def next_token(tokens: list[int]) -> int:
    return runner().next_token(tokens)


def expected(prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        token = next_token(tokens)
        if token == 0:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)  # type: ignore[arg-type]


BEGINNING = [11, 7, 5, 3, 2, 1, 42, 99, 13, 17, 19, 23]
prompts = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20) | st.builds(
    lambda shared, rest: BEGINNING[:shared] + rest,  # requests that begin alike share blocks
    st.integers(0, len(BEGINNING)),
    st.lists(st.integers(1, 2), min_size=1, max_size=8),
)
requests = st.lists(st.tuples(prompts, st.integers(1, 12)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(requests, st.integers(1, 5), st.integers(1, 9), st.integers(8, 20))
def test_completions_do_not_depend_on_batching_chunking_or_preemption(
    wanted: list[tuple[list[int], int]], max_batch_size: int, max_prefill_tokens: int, num_blocks: int
) -> None:
    engine = Engine(
        CONFIG, runner(num_blocks), EngineOptions(max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens)
    )
    completions = engine.generate([prompt for prompt, _ in wanted], [greedy(count) for _, count in wanted])
    assert [(c.token_ids, c.finish_reason) for c in completions] == [expected(*request) for request in wanted]
    assert engine.num_free_blocks == num_blocks
    assert not engine.has_unfinished()


@settings(max_examples=200, deadline=None)
@given(requests, st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7))))
def test_aborts_at_any_step_free_their_blocks_and_harm_nobody(
    wanted: list[tuple[list[int], int]], aborts: list[tuple[int, int]]
) -> None:
    engine = Engine(CONFIG, runner(), EngineOptions(max_batch_size=4, max_prefill_tokens=5))
    for index, (prompt, count) in enumerate(wanted):
        engine.add(str(index), prompt, greedy(count))
    outputs: dict[str, list[StepOutput]] = {str(index): [] for index in range(len(wanted))}
    aborted = set()
    for step in range(1000):
        for when, index in aborts:
            if when == step and engine.abort(str(index)):
                aborted.add(str(index))
        if not engine.has_unfinished():
            break
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert not engine.has_unfinished()
    assert engine.num_free_blocks == 8
    for request_id, parts in outputs.items():
        if request_id not in aborted:
            tokens = [token for part in parts for token in part.token_ids]
            assert (tokens, parts[-1].finish_reason) == expected(*wanted[int(request_id)])
            assert all(part.finish_reason is None for part in parts[:-1])


def test_requests_with_the_same_beginning_share_its_blocks() -> None:
    prompt = list(range(1, 14))  # three full blocks of 4, and one token
    engine = Engine(CONFIG, runner(12), EngineOptions(max_batch_size=4))
    first = engine.generate([prompt], greedy(3))
    assert engine.prefix_hit_rate == 0
    again = engine.generate([prompt, [*prompt[:12], 50], prompt], greedy(3))
    assert [again[0], again[2]] == [first[0], first[0]]
    assert again[1].token_ids == expected([*prompt[:12], 50], 3)[0]
    assert engine.prefix_hit_rate == 36 / 52
    assert engine.num_free_blocks == 12


def test_a_request_can_pass_the_prefix_cache_by() -> None:
    prompt = list(range(1, 18))
    engine = Engine(CONFIG, runner(12), EngineOptions(max_batch_size=4))
    hits = []
    for by in (True, False, False, True):
        [completion] = engine.generate([prompt], greedy(3, use_prefix_cache=not by))
        assert completion.token_ids == expected(prompt, 3)[0]
        hits.append(engine.stats().num_prefix_hit_tokens)
    assert hits == [0, 0, 16, 16]  # the first one left nothing, the last one took nothing
    assert engine.num_free_blocks == 12


def test_a_shared_beginning_is_held_once_while_requests_run() -> None:
    prompt = list(range(1, 14))
    engine = Engine(CONFIG, runner(12), EngineOptions(max_batch_size=4))
    engine.generate([prompt], greedy(1))
    for name in "abc":
        engine.add(name, prompt, greedy(4))
    for _ in range(3):
        engine.step()
    assert engine.num_free_blocks == 12 - 3 - 3  # three shared blocks, and one of each request's own


def test_preemption_happens_and_is_counted() -> None:
    engine = Engine(CONFIG, runner(8), EngineOptions(max_batch_size=8))
    engine.generate([[1, 2, 3]] * 6, greedy(20))
    assert engine.num_preemptions > 0


def test_a_long_prompt_does_not_stall_a_running_request() -> None:
    engine = Engine(CONFIG, runner(16), EngineOptions(max_prefill_tokens=4))
    engine.add("running", [5], greedy(30))
    engine.step()
    engine.add("long", [7] * 30, greedy(1))
    steps = [engine.step() for _ in range(8)]  # 30 tokens in chunks of 4
    assert all(any(output.request_id == "running" for output in step) for step in steps)
    assert steps[-1][-1].request_id == "long"


def test_stop_ids_end_a_request_and_are_left_out() -> None:
    tokens, _ = expected([3, 4], 10)
    engine = Engine(CONFIG, runner())
    [completion] = engine.generate([[3, 4]], greedy(10, stop_token_ids=(tokens[2],)))
    assert completion.token_ids == tokens[: tokens.index(tokens[2])]
    assert completion.finish_reason == "stop"


def test_ignore_eos_goes_on() -> None:
    prompt = next([a, b] for a in range(1, VOCAB) for b in range(1, VOCAB) if (a + 2 * b) % VOCAB == 0)
    engine = Engine(CONFIG, runner())
    assert engine.generate([prompt], greedy(3))[0].token_ids == []
    assert len(engine.generate([prompt], greedy(3, ignore_eos=True))[0].token_ids) == 3


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(1), "prompt is empty"),
        ([VOCAB], greedy(1), "prompt id 101 is outside the vocabulary"),
        ([-1], greedy(1), "prompt id -1 is outside the vocabulary"),
        ([1] * 40, greedy(1), "exceed the 32 tokens"),
        ([1] * 10, greedy(23), "max_tokens=23 exceed the 32 tokens .* lower max_tokens or raise num_blocks"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_any_starts(
    prompt: list[int], params: SamplingParams, message: str
) -> None:
    fake = runner()
    engine = Engine(CONFIG, fake)
    with pytest.raises(RequestError, match=message):
        engine.generate([[1, 2], prompt], params)
    assert fake.num_calls == 0
    assert not engine.has_unfinished()
    assert engine.num_free_blocks == 8


def test_a_request_that_is_too_long_hears_what_the_limit_is() -> None:
    for options, blocks, advice in (
        (EngineOptions(max_seq_len=12), 8, "or raise max_seq_len"),
        (EngineOptions(), 8, "or raise num_blocks"),
        (EngineOptions(), 64, f"as the model's context is {CONFIG.max_seq_len}"),
    ):
        with pytest.raises(RequestError, match=advice):
            Engine(CONFIG, runner(blocks), options).generate([[1] * CONFIG.max_seq_len], greedy(1))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"logit_bias": {VOCAB: 1.0}}, "logit_bias"), ({"stop_token_ids": (VOCAB,)}, "stop_token_ids")],
)
def test_parameters_naming_ids_outside_the_vocabulary_are_refused(change: dict[str, object], name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} has id 101, outside the vocabulary"):
        Engine(CONFIG, runner()).generate([[1]], greedy(1, **change))


def test_min_tokens_holds_back_the_end_and_logprobs_cover_every_token() -> None:
    prompt = next([a, b] for a in range(1, VOCAB) for b in range(1, VOCAB) if (a + 2 * b) % VOCAB == 0)
    [completion] = Engine(CONFIG, runner()).generate([prompt], greedy(3, min_tokens=2, logprobs=1))
    assert len(completion.token_ids) >= 2
    assert completion.logprobs is not None
    assert [report.token_id for report in completion.logprobs] == completion.token_ids
    # The first token is not what the model says (that would be the end), the others are.
    assert completion.logprobs[0].top[0][0] == 0
    assert all(report.top[0][0] == report.token_id for report in completion.logprobs[1:])


def test_an_interrupted_generate_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(CONFIG, runner())
    with monkeypatch.context() as patch:
        patch.setattr(SumRunner, "forward", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1, 2], [3]], greedy(3))
    assert not engine.has_unfinished()
    assert engine.num_free_blocks == 8
    assert engine.generate([[3, 4]], greedy(4))[0].token_ids == expected([3, 4], 4)[0]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_generate_does_not_run_beside_added_requests() -> None:
    engine = Engine(CONFIG, runner())
    engine.add("mine", [1], greedy(1))
    with pytest.raises(RequestError, match="generate runs alone"):
        engine.generate([[1]], greedy(1))


@pytest.mark.parametrize("prompt", [["123"], [1.9], [True]])
def test_prompts_that_are_no_ids_are_refused(prompt: list[object]) -> None:
    with pytest.raises(RequestError, match="no integer"):
        Engine(CONFIG, runner()).generate([prompt], greedy(1))  # type: ignore[list-item]


def test_max_tokens_none_fills_the_context() -> None:
    [completion] = Engine(CONFIG, runner()).generate([[1] * 10], SamplingParams(None, temperature=0, ignore_eos=True))
    assert len(completion.token_ids) == 22


def test_an_id_in_use_is_refused() -> None:
    engine = Engine(CONFIG, runner())
    engine.add("a", [1], greedy(1))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add("a", [1], greedy(1))
    assert not engine.abort("b")


def test_a_context_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_seq_len is 33, allowed is 1 to 32"):
        Engine(CONFIG, runner(), EngineOptions(max_seq_len=33))
