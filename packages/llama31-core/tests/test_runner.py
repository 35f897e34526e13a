"""The compiled graph over a paged cache against transformers, step by step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams

CONFIG = ModelConfig(
    vocab_size=320,
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=176,
    max_seq_len=512,
    rope_scaling=RopeScaling(original_max_seq_len=32),
)
Weights = dict[str, npt.NDArray[np.float32]]


def reference_logits(weights: Weights, tokens: list[int]) -> npt.NDArray[np.float32]:
    """transformers' logits (T, V) of one sequence."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf())).eval()
    model.load_state_dict({spell(name, "hf"): torch.from_numpy(value) for name, value in weights.items()})
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def test_prefill_in_chunks_and_decode_in_a_batch_equal_the_whole_sequence(
    random_weights: Callable[..., Weights], build_runner: Callable[..., GraphRunner]
) -> None:
    weights = random_weights(CONFIG)
    runner = build_runner(CONFIG, weights, num_blocks=40, block_size=8)
    rng = np.random.default_rng(3)
    long, short = rng.integers(0, 320, 150).tolist(), rng.integers(0, 320, 21).tolist()
    # Blocks in no order, so that a wrong table shows.
    long_table, short_table = list(range(39, 19, -1)), [3, 1, 7]
    want_long, want_short = reference_logits(weights, long), reference_logits(weights, short)

    assert len(runner.forward(ForwardInput([long[:100]], [0], [long_table], [0]))) == 0
    # Rows of different length, and logits of one, of several and of all tokens.
    got = runner.forward(ForwardInput([long[100:149], short[:19]], [100, 0], [long_table, short_table], [3, 19]))
    np.testing.assert_allclose(got, [*want_long[146:149], *want_short[:19]], atol=1e-4)
    got = runner.forward(ForwardInput([short[19:21], [long[149]]], [19, 149], [short_table, long_table], [1, 1]))
    np.testing.assert_allclose(got, [want_short[20], want_long[149]], atol=1e-4)


def test_greedy_tokens_equal_transformers_while_requests_come_and_go(
    random_weights: Callable[..., Weights], build_runner: Callable[..., GraphRunner]
) -> None:
    weights = random_weights(CONFIG)
    engine = Engine(CONFIG, build_runner(CONFIG, weights), EngineOptions(max_batch_size=3, max_prefill_tokens=16))
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 320, size).tolist() for size in (1, 40, 7, 16, 33)]
    completions = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0))
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = reference_logits(weights, prompt + completion.token_ids)
        assert completion.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert completion.finish_reason == "length"
    assert engine.num_free_blocks == 64


def test_logprobs_of_prompt_and_completion_equal_transformers(
    random_weights: Callable[..., Weights], build_runner: Callable[..., GraphRunner]
) -> None:
    weights = random_weights(CONFIG)
    engine = Engine(CONFIG, build_runner(CONFIG, weights), EngineOptions(max_prefill_tokens=16))
    prompt = np.random.default_rng(6).integers(0, 320, 37).tolist()
    params = SamplingParams(max_tokens=5, seed=1, temperature=0.8, logprobs=3, prompt_logprobs=3, ignore_eos=True)
    for _ in range(2):  # the second time the prompt is in the cache, and computed again for its logits
        [completion] = engine.generate([prompt], params)
        tokens = prompt + completion.token_ids
        expected = torch.log_softmax(torch.from_numpy(reference_logits(weights, tokens)).double(), -1)
        assert completion.prompt_logprobs is not None
        assert completion.logprobs is not None
        assert completion.prompt_logprobs[0] is None
        reports = [*completion.prompt_logprobs[1:], *completion.logprobs]
        assert len(reports) == len(tokens) - 1
        for position, report in enumerate(reports):
            assert report is not None
            assert report.token_id == tokens[position + 1]
            likeliest = expected[position].topk(3)
            assert report.logprob == pytest.approx(expected[position, report.token_id].item(), abs=1e-4)
            assert [value for _, value in report.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
