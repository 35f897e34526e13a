"""Guessing tokens ahead changes no completion: greedy and seeded ones token for token, free ones in distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.draft_model import DraftModelProposer
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.speculation import NgramProposer, Proposer

Floats = npt.NDArray[np.float32]
LOGITS = np.random.default_rng(0).normal(0, 1, (5, 5)).astype(np.float32)  # what follows each of five tokens
SIZES = {"dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "ffn_dim": 8, "max_seq_len": 64}


class MarkovRunner:
    """The next token depends on the last one alone, so probabilities of whole completions are known."""

    num_blocks, block_size, num_host_blocks = 4096, 4, 0

    def __init__(self, logits: Floats) -> None:
        self.logits = logits

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """Nothing is kept that could move."""

    def forward(self, batch: ForwardInput) -> Floats:
        """See Runner."""
        rows = zip(batch.token_ids, batch.num_logits, strict=True)
        last = [token for tokens, count in rows for token in tokens[len(tokens) - count :]]
        return self.logits[np.array(last, np.int64)]


def draft() -> Proposer:
    """A model that is right now and then."""
    noise = np.random.default_rng(1).normal(0, 1, LOGITS.shape).astype(np.float32)
    return DraftModelProposer(MarkovRunner(LOGITS + noise), MarkovRunner(LOGITS))


@pytest.mark.parametrize("build_proposer", [NgramProposer, draft])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_free_draws_follow_the_models_distribution(build_proposer: Callable[[], Proposer], temperature: float) -> None:
    """Pearson's chi-square of all completions of three tokens against their exact probabilities."""
    config = ModelConfig.build("test", vocab_size=5, **SIZES)
    options = EngineOptions(num_speculative_tokens=3, max_batch_size=64)
    engine = Engine(config, MarkovRunner(LOGITS), options, proposer=build_proposer())
    count, prompt = 6000, [0, 3, 1, 4, 2, 3, 1, 0, 2]
    params = [SamplingParams(3, seed=seed, temperature=temperature, ignore_eos=True) for seed in range(count)]
    drawn = Counter(tuple(done.token_ids) for done in engine.generate([prompt] * count, params))
    weights = np.exp(LOGITS / temperature)
    chances = weights / weights.sum(1, keepdims=True)
    statistic = 0.0
    for a, b, c in product(range(5), repeat=3):
        expected = count * chances[prompt[-1], a] * chances[a, b] * chances[b, c]
        statistic += (drawn[a, b, c] - expected) ** 2 / expected
    freedom = 5**3 - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
    assert 0.1 < engine.stats().acceptance_rate < 0.95


@pytest.mark.parametrize(
    ("proposes", "native", "cache_dtype"),
    [
        ("prompt lookup", False, ms.float32),
        ("prompt lookup", True, ms.float32),
        ("another model", True, ms.float32),
        ("another model", True, ms.bfloat16),
        ("the model itself", True, ms.float32),
        ("the model itself", True, ms.bfloat16),
    ],
)
def test_completions_are_the_same_token_for_token(
    proposes: str,
    native: bool,
    cache_dtype: ms.Type,
    random_weights: Callable[..., dict[str, Floats]],
    build_runner: Callable[..., GraphRunner],
) -> None:
    """With penalties, bans and prompts that repeat themselves."""
    config = ModelConfig.build("test", vocab_size=61, **SIZES | {"dim": 32, "n_heads": 4, "n_kv_heads": 2})
    weights = random_weights(config)
    kind = {"native": native, "cache_dtype": cache_dtype}
    runner = build_runner(config, weights, 60, 4, **kind)
    rng = np.random.default_rng(7)
    proposer: Proposer = NgramProposer()
    if proposes != "prompt lookup":
        spread = 0.05 if proposes == "another model" else 0.0
        disturbed = {name: value * rng.normal(1, spread, value.shape).astype("f") for name, value in weights.items()}
        proposer = DraftModelProposer(build_runner(config, disturbed, 60, 4, **kind), runner)
    prompts = [[*rng.integers(0, 61, 6).tolist()] * 3 for _ in range(5)]
    more: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1, "temperature": 0.5, "n": 2},
        {"seed": 2, "top_k": 3, "logprobs": 1},
        {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"seed": 3, "top_p": 0.8, "min_tokens": 20, "bad_words_ids": ((4,), (5, 6))},
    ]
    params = [SamplingParams(24, ignore_eos=True, **own) for own in more]
    plain = Engine(config, runner, EngineOptions()).generate(prompts, params)
    guessing = Engine(config, runner, EngineOptions(num_speculative_tokens=4), proposer=proposer)
    guessed = guessing.generate(prompts, params)
    assert [completion.token_ids for completion in guessed] == [completion.token_ids for completion in plain]
    for mine, theirs in zip(guessed[3].logprobs or [], plain[3].logprobs or [], strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert guessing.stats().num_accepted_tokens > 0
    if proposes == "the model itself":  # with the random numbers of the draws: it is right if it saw the same tokens
        assert guessing.stats().acceptance_rate > 0.98


def test_a_draft_model_with_another_cache_is_refused() -> None:
    other = MarkovRunner(LOGITS)
    other.num_blocks = 7
    with pytest.raises(ConfigError, match=r"the draft model's cache is \(7, 4, 0\) .* the model's \(4096, 4, 0\)"):
        DraftModelProposer(other, MarkovRunner(LOGITS))
