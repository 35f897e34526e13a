"""Sampling against transformers' logits processors and against what chance allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama31_core.errors import RequestError
from llama31_core.inference.sampling import Sampler, SamplingParams, nucleus


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 5),
    st.integers(0, 60),
    st.floats(0.05, 1),
)
def test_probabilities_equal_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, 50).astype(np.float32)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()

    ids, probabilities = nucleus(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    got = np.zeros(50)
    got[ids] = probabilities
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingParams(seed=1, top_k=3))
    counts = np.bincount([sampler.draw(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.015)  # over 4 sigma


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    draws = [[Sampler(SamplingParams(seed=seed)).draw(logits) for _ in range(1)] for seed in (7, 7, None, None)]
    assert draws[0] == draws[1]
    assert any(Sampler(SamplingParams()).draw(logits) != draws[2][0] for _ in range(20))


def test_greedy_takes_the_most_likely() -> None:
    assert Sampler(SamplingParams(temperature=0)).draw(np.array([1, 5, 3], np.float32)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("stop_token_ids", (-5,)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
