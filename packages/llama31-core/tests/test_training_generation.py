"""Completions of sample prompts during training, against an engine that loads the same weights from a directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mindspore import Tensor

from llama31_core import Engine, SamplingParams
from llama31_core.checkpoint import save_weights
from llama31_core.config import ModelConfig
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.generation import SampleGenerator
from llama31_core.training.lora import Lora
from llama31_core.training.weights import TrainedWeights

CONFIG, LORA, PROMPTS = ModelConfig.preset("tiny"), Lora(("attention.wv",), rank=2, alpha=8), [[1, 2, 3], [9]]
STEM = "model.layers.0.attention.wv"


def test_samples_are_of_the_weights_as_they_are_now(
    tmp_path: Path, random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]]
) -> None:
    values, rng = random_weights(CONFIG), np.random.default_rng(0)
    weights = TrainedWeights(CONFIG, BlockwiseAttention)
    weights.load(values.__getitem__)
    out_features, in_features = values[f"{STEM}.weight"].shape
    a = rng.normal(size=(2, in_features)).astype(np.float32)
    generator = SampleGenerator(weights, LORA, PROMPTS, max_tokens=12)
    seen = []
    for step in range(3):
        b = rng.normal(size=(out_features, 2)).astype(np.float32) * step
        weights.tensors |= {f"{STEM}.lora_a": Tensor(a), f"{STEM}.lora_b": Tensor(b)}
        directory = tmp_path / str(step)
        CONFIG.save_pretrained(directory)
        now = values | {f"{STEM}.weight": values[f"{STEM}.weight"] + np.float32(4) * (b @ a)}
        save_weights(directory, now.items())
        engine = Engine.from_pretrained(directory, num_blocks=16)
        params = SamplingParams(max_tokens=12, temperature=0)
        want = tuple(tuple(completion.token_ids) for completion in engine.generate(PROMPTS, params))
        assert generator.generate() == want
        seen.append(want)
    assert len(set(seen)) == 3
