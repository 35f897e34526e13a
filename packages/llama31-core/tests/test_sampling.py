"""Sampling against transformers' logits processors and against what chance allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.errors import RequestError
from llama31_core.inference.sampling import Sampler, candidates
from llama31_core.inference.sampling_params import SamplingParams

VOCAB = 50


def some_logits(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def hf_probabilities(logits: npt.NDArray[np.float32], processors: list[Any], tokens: list[int]) -> npt.NDArray[Any]:
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for processor in processors:
        scores = processor(torch.tensor([tokens]), scores)
    probabilities: npt.NDArray[Any] = torch.softmax(scores, -1)[0].numpy()
    return probabilities


def our_probabilities(
    logits: npt.NDArray[np.float32], params: SamplingParams, prompt: list[int], output: list[int], stop: frozenset[int]
) -> npt.NDArray[Any]:
    sampler = Sampler(params, stop)
    ids, probabilities = candidates(sampler.adjust(logits, prompt, output), params)
    full = np.zeros(VOCAB)
    full[ids] = probabilities
    return full


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 5),
    st.integers(0, 60),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.floats(0.05, 1),
)
def test_filters_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    processors: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
    processors += [hf.TopKLogitsWarper(top_k)] if top_k else []
    processors += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [hf.MinPLogitsWarper(min_p)] if min_p > 0 else []
    processors += [hf.TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    logits = some_logits(seed)
    got = our_probabilities(logits, params, [0], [], frozenset())
    np.testing.assert_allclose(got, hf_probabilities(logits, processors, [0]), atol=1e-9)


def sorted_reference(logits: npt.NDArray[np.float32], params: SamplingParams) -> npt.NDArray[Any]:
    """The filters as their papers say, over all tokens in order."""
    scores = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scores, kind="stable")
    chances = np.exp(scores[order] - scores.max())
    chances /= chances.sum()
    if params.top_k:
        chances[params.top_k :] = 0
        chances /= chances.sum()
    if params.top_p < 1:
        chances[np.cumsum(chances) - chances >= params.top_p] = 0
        chances /= chances.sum()
    chances[chances < params.min_p * chances.max()] = 0
    full = np.zeros(len(logits))
    full[order] = chances / chances.sum()
    return full


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([300, 3000, 20_000]),
    st.floats(0.2, 30),
    st.sampled_from([0, 0, 7, 500]),
    st.floats(0.05, 1),
    st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    st.integers(0, 2500),
)
def test_large_vocabularies_equal_a_plain_reference(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, num_equal: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, size).astype(np.float32)
    if not top_k:  # which of equal ones are among the k is left open
        logits[rng.integers(0, size, min(num_equal, size))] = 1.5
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = candidates(logits, params)
    full = np.zeros(size)
    full[ids] = probabilities
    # A sum that differs in its last bit may take one more of the least likely ones.
    np.testing.assert_allclose(full, sorted_reference(logits, params), atol=2 * probabilities.min())
    assert abs(np.count_nonzero(full) - np.count_nonzero(sorted_reference(logits, params))) <= 1


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.lists(st.integers(0, VOCAB - 1), max_size=12),
    st.floats(0.5, 3),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), max_size=4, unique_by=tuple),
    st.integers(0, 12),
)
def test_penalties_and_bans_equal_transformers(
    seed: int, prompt: list[int], output: list[int], penalty: float, bad_words: list[list[int]], min_tokens: int
) -> None:
    stop = [0, 7]
    processors: list[Any] = [hf.RepetitionPenaltyLogitsProcessor(penalty)]
    processors += [hf.NoBadWordsLogitsProcessor(bad_words)] if bad_words else []
    processors += [hf.MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, stop, device="cpu")]
    params = SamplingParams(
        max_tokens=None,
        repetition_penalty=penalty,
        bad_words_ids=tuple(map(tuple, bad_words)),
        min_tokens=min_tokens,
    )
    logits = some_logits(seed)
    got = our_probabilities(logits, params, prompt, output, frozenset(stop))
    np.testing.assert_allclose(got, hf_probabilities(logits, processors, prompt + output), atol=1e-9)


def test_presence_frequency_and_bias_are_what_their_formula_says() -> None:
    logits = np.zeros(4, np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.0})
    scores = Sampler(params).adjust(logits, [2], [0, 0, 1])
    np.testing.assert_allclose(scores, [-0.5 - 2 * 0.25, -0.5 - 0.25, 0, 2])


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingParams(seed=1, top_k=3))
    counts = np.bincount([sampler.draw(logits, [0], []) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.015)  # over 4 sigma


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = (Sampler(SamplingParams(seed=7)) for _ in range(2))
    assert [first.draw(logits, [0], []) for _ in range(9)] == [second.draw(logits, [0], []) for _ in range(9)]
    assert len({Sampler(SamplingParams()).draw(logits, [0], []) for _ in range(20)}) > 1


def test_greedy_takes_the_most_likely_after_the_penalties() -> None:
    logits = np.array([1, 5, 3], np.float32)
    assert Sampler(SamplingParams(temperature=0)).draw(logits, [0], []) == 1
    assert Sampler(SamplingParams(temperature=0, logit_bias={1: -9.0})).draw(logits, [0], []) == 2


def test_logprobs_are_those_of_the_model_and_equal_torch() -> None:
    logits = some_logits(3)
    report = Sampler(SamplingParams(logprobs=5, temperature=0.1, logit_bias={4: 100.0})).logprobs(logits, 9)
    expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1)
    assert report is not None
    assert report.logprob == pytest.approx(expected[9].item())
    top = expected.topk(5)
    assert [token for token, _ in report.top] == top.indices.tolist()
    np.testing.assert_allclose([value for _, value in report.top], top.values.numpy())
    assert Sampler(SamplingParams()).logprobs(logits, 9) is None


def test_equal_tokens_are_reported_by_their_ids() -> None:
    report = Sampler(SamplingParams(logprobs=3)).logprobs(np.array([0, 2, 1, 2, 2, 2], np.float32), 0)
    assert report is not None
    assert [token for token, _ in report.top] == [1, 3, 4]
    none = Sampler(SamplingParams(logprobs=0)).logprobs(np.zeros(3, np.float32), 2)
    assert none is not None
    assert (none.token_id, none.top) == (2, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-320),
        ("stop_token_ids", 5),
        ("logit_bias", [1, 2]),
        ("bad_words_ids", [1, 2]),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", "1"),
        ("seed", -1),
        ("stop_token_ids", (-5,)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("bad_words_ids", ((),)),
        ("logprobs", 101),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
