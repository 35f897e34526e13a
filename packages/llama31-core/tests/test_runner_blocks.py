"""Blocks of a real cache are copied, swapped and cleared without a change to what is computed; so are seeds kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.config import ModelConfig
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams

CONFIG = ModelConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=128)
Weights = dict[str, npt.NDArray[np.float32]]
Build = Callable[..., GraphRunner]
KINDS: dict[str, dict[str, Any]] = {
    "portable": {},
    "native": {"native": True},
    "native, bfloat16 cache": {"native": True, "cache_dtype": ms.bfloat16},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def build(random_weights: Callable[..., Weights], build_runner: Build) -> Build:
    weights = random_weights(CONFIG)
    return lambda **sizes: build_runner(CONFIG, weights, **sizes)


@kinds
def test_moved_blocks_hold_what_they_held(kind: dict[str, Any], build: Build) -> None:
    runner = build(num_blocks=24, block_size=4, num_host_blocks=6, **kind)
    prompts = np.random.default_rng(1).integers(0, 97, (2, 11)).tolist()
    tables = [[1, 2, 3], [4, 5, 6]]
    runner.forward(ForwardInput([prompt[:10] for prompt in prompts], [0, 0], tables, [1, 1]))

    def last_logits(*where: list[int]) -> npt.NDArray[np.float32]:
        return runner.forward(ForwardInput([prompt[10:] for prompt in prompts], [10, 10], list(where), [1, 1]))

    want = last_logits(*tables)
    copies = [BlockMove("copy", 1, 10), BlockMove("copy", 2, 11), BlockMove("copy", 3, 12), BlockMove("copy", 10, 13)]
    runner.move_blocks(copies)  # the last one copies a copy
    np.testing.assert_array_equal(last_logits([13, 11, 12], tables[1]), want)
    # To the host, all of it overwritten, and back to other blocks in another order, one of the host used again at once.
    out = [BlockMove("out", block, place) for place, block in enumerate((4, 5, 6, 13, 11, 12))]
    clear = [BlockMove("clear", block, block) for block in range(24)]
    back = [BlockMove("in", place, block) for place, block in enumerate((20, 7, 9, 2, 1, 0))]
    again = [BlockMove("out", 0, 0), BlockMove("copy", 7, 8), BlockMove("in", 0, 23)]
    runner.move_blocks([*out, *clear, *back, *again])
    np.testing.assert_array_equal(last_logits([2, 1, 23], [20, 8, 9]), want)
    caches = [p for name, p in runner.llama.parameters_and_names() if name.endswith("_cache")]
    for cache in caches:
        blocks = cache.astype(ms.float32).asnumpy().reshape(24, -1)
        assert not blocks[[3, 4, 5, 6, 10, 11]].any()
        assert blocks[[0, 1, 2, 7, 8, 9, 20, 23]].any(1).all()


@kinds
def test_completions_are_the_same_through_swapping_and_copies(kind: dict[str, Any], build: Build) -> None:
    prompts = np.random.default_rng(2).integers(0, 97, (5, 10)).tolist()
    params = [
        SamplingParams(24, temperature=0, ignore_eos=True),
        SamplingParams(24, seed=3, n=3, ignore_eos=True),  # three branches write to the shared last block
        SamplingParams(8, temperature=0, num_beams=3, n=2, ignore_eos=True),
        SamplingParams(24, seed=4, ignore_eos=True),
        SamplingParams(24, seed=5, top_k=9, n=2, ignore_eos=True),
    ]

    def complete(num_blocks: int, num_host_blocks: int) -> tuple[list[list[int]], Engine]:
        runner = build(num_blocks=num_blocks, block_size=4, num_host_blocks=num_host_blocks, **kind)
        engine = Engine(CONFIG, runner, EngineOptions(max_batch_size=12, max_prefill_tokens=16, max_seq_len=40))
        return [completion.token_ids for completion in engine.generate(prompts, params)], engine

    want, roomy = complete(100, 0)
    got, narrow = complete(24, 40)
    assert roomy.num_preemptions == 0
    assert narrow.stats().num_swapped_in > 0
    assert got == want


@kinds
def test_a_seed_gives_the_same_tokens_whatever_else_runs(kind: dict[str, Any], build: Build) -> None:
    """Alone, in a crowd that comes and goes, in chunks of another size, and with guesses."""
    rng = np.random.default_rng(3)
    mine = rng.integers(0, 97, 33).tolist()
    params = SamplingParams(30, seed=11, temperature=1.3, top_p=0.95, n=2, ignore_eos=True)
    runner = build(num_blocks=100, block_size=4, **kind)

    def complete(crowd: int, **options: Any) -> dict[int, list[int]]:
        engine = Engine(CONFIG, runner, EngineOptions(max_batch_size=10, **options))
        tokens: dict[int, list[int]] = {0: [], 1: []}
        for step in range(200):
            if step < crowd:
                other = rng.integers(0, 97, int(rng.integers(1, 40))).tolist()
                engine.add(f"other {step}", other, SamplingParams(int(rng.integers(1, 20)), n=1 + step % 2))
            if step == 2:
                engine.add("mine", mine, params)
            for output in engine.step():
                if output.request_id == "mine":
                    tokens[output.index] += output.token_ids
        assert not engine.has_unfinished()
        return tokens

    alone = complete(0)
    assert [len(tokens) for tokens in alone.values()] == [30, 30]
    assert complete(12) == alone
    assert complete(12, max_prefill_tokens=7) == alone
    assert complete(5, num_speculative_tokens=3) == alone
