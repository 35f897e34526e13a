"""The model against transformers' LlamaForCausalLM with the same random weights, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from mindspore import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.model import CausalAttention, Llama

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 176,
    "max_seq_len": 512,
}
CONFIGS = {
    "llama3.1: GQA, scaled rotary, untied": BASE | {"rope_scaling": RopeScaling(original_max_seq_len=64)},
    "plain rotary, tied": BASE | {"tie_word_embeddings": True, "rope_theta": 10000.0},
    "head_dim is not dim / n_heads": BASE | {"head_dim": 32, "n_kv_heads": 1},
}


def reference(config: ModelConfig, weights: dict[str, npt.NDArray[np.float32]]) -> LlamaForCausalLM:
    """transformers' model of the same architecture with the same weights."""
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf())).eval()
    state = {spell(name, "hf"): torch.from_numpy(value) for name, value in weights.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(
    values: dict[str, Any], random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]]
) -> None:
    config = ModelConfig(**values)
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 300))  # well beyond the original 64
    with torch.no_grad():
        expected = reference(config, weights)(torch.from_numpy(tokens)).logits.numpy()

    llama = Llama(config, CausalAttention)
    for name, parameter in llama.parameters_and_names():
        parameter.set_data(Tensor(weights[name]))
    positions = np.tile(np.arange(300, dtype=np.int32), (2, 1))
    logits = llama(Tensor(tokens.astype(np.int32)), Tensor(positions), Tensor(np.zeros_like(positions))).asnumpy()

    assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(expected).max() > 1  # or the line above would say little
