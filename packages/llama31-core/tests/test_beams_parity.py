"""Beam search over the compiled model against transformers' `generate`: the same sequences, order and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.request import Completion
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams

EOS = (2, 3, 4, 5)
CONFIG = ModelConfig(
    vocab_size=29, dim=24, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, max_seq_len=64, eos_token_ids=EOS
)
Weights = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(6, 29, size).tolist() for size in (1, 5, 12, 20)]


def reference(model: LlamaForCausalLM, prompt: list[int], **choices: Any) -> list[tuple[list[int], bool, float]]:
    """Tokens of each sequence without its end, whether it has one, and its score."""
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(EOS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **choices,
    )
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    found = []
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((index for index, token in enumerate(row) if token in EOS), None)
        found.append((row[:end], end is not None, score))
    return found


CHOICES: list[dict[str, Any]] = [
    {"num_beams": 2, "num_return_sequences": 1},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": -1.0, "early_stopping": True},
    {"num_beams": 5, "num_return_sequences": 5, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 1.5},
    {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.4, "min_new_tokens": 4},
]


def test_sequences_and_scores_equal_transformers(
    prompts: list[list[int]], random_weights: Callable[..., Weights], build_runner: Callable[..., GraphRunner]
) -> None:
    ended = 0
    for seed in range(2):
        weights = random_weights(CONFIG, seed)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf())).eval()
        model.load_state_dict({spell(name, "hf"): torch.from_numpy(value) for name, value in weights.items()})
        # Few blocks, so that beams are computed again now and then.
        engine = Engine(CONFIG, build_runner(CONFIG, weights, 24, 4), EngineOptions(max_batch_size=16, max_seq_len=40))
        for choices in CHOICES:
            params = SamplingParams(
                max_tokens=12,
                temperature=0,
                num_beams=choices["num_beams"],
                n=choices["num_return_sequences"],
                length_penalty=choices.get("length_penalty", 1.0),
                early_stopping=choices.get("early_stopping", False),
                repetition_penalty=choices.get("repetition_penalty", 1.0),
                min_tokens=choices.get("min_new_tokens", 0),
            )
            got = engine.generate(prompts, params)
            for index, prompt in enumerate(prompts):
                want = reference(model, prompt, max_new_tokens=12, **choices)
                mine: list[Completion] = got[index * params.n : (index + 1) * params.n]
                assert [(c.token_ids, c.finish_reason == "stop") for c in mine] == [(w[0], w[1]) for w in want]
                assert [c.score for c in mine] == pytest.approx([w[2] for w in want], abs=1e-4)
                ended += sum(w[1] for w in want)
    assert ended > 20
    assert engine.num_preemptions > 0
    assert engine.num_free_blocks == 24
