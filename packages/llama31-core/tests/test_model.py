"""The model against transformers' LlamaForCausalLM with the same random weights, in float32."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from mindspore import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.model import CausalAttention, Llama
from llama31_core.presets import PRESETS
from llama31_core.rope_frequencies import inverse_frequencies

Weights = dict[str, npt.NDArray[np.float32]]


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small Llamas of every kind: grouped, multi-query and multi-head; heads narrower and wider than dim / n_heads."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 5]))
    scaling = RopeScaling(
        factor=draw(st.sampled_from([1.0, 4.0, 8.0, 32.0])),
        low_freq_factor=draw(st.sampled_from([0.5, 1.0, 2.0])),
        high_freq_factor=draw(st.sampled_from([3.0, 4.0, 8.0])),
        original_max_seq_len=draw(st.sampled_from([16, 64])),
    )
    return ModelConfig(
        vocab_size=draw(st.sampled_from([97, 320])),
        dim=heads * draw(st.sampled_from([3, 8, 10, 16])),  # transformers wants a multiple, whatever head_dim is
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 10, 16, 32])),
        ffn_dim=draw(st.sampled_from([40, 176])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([1e4, 1e5, 5e5])),
        rope_scaling=draw(st.sampled_from([scaling, None])),
        max_seq_len=512,
        tie_word_embeddings=draw(st.booleans()),
    )


def reference(config: ModelConfig, weights: Weights) -> LlamaForCausalLM:
    """transformers' model of the same architecture with the same weights."""
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf())).eval()
    state = {spell(name, "hf"): torch.from_numpy(value) for name, value in weights.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def logits_of(config: ModelConfig, weights: Weights, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    llama = Llama(config, CausalAttention)
    for name, parameter in llama.parameters_and_names():
        parameter.set_data(Tensor(weights[name]))
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    inputs = (tokens.astype(np.int32), positions, np.zeros_like(positions))
    logits: npt.NDArray[np.float32] = llama(*map(Tensor, inputs)).asnumpy()
    return logits


@given(config=configs(), seed=st.integers(0, 2**16), count=st.sampled_from([1, 17, 150]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_equal_transformers(
    random_weights: Callable[..., Weights], config: ModelConfig, seed: int, count: int
) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)  # compiling takes longer than all of this
    weights = random_weights(config, seed)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, count))  # 150: beyond the original context
    with torch.no_grad():
        expected = reference(config, weights)(torch.from_numpy(tokens)).logits.numpy()
    difference = np.abs(logits_of(config, weights, tokens) - expected).max()
    note(f"largest difference {difference}, largest logit {np.abs(expected).max()}")
    assert difference < 1e-4
    assert np.abs(expected).max() > 0.5  # or the line above would say little


def test_a_compiled_graph_gives_the_same(random_weights: Callable[..., Weights]) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    config = ModelConfig.preset("tiny")
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 300))
    with torch.no_grad():
        expected = reference(config, weights)(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(logits_of(config, weights, tokens) - expected).max() < 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_rotary_frequencies_of_published_models_are_those_of_transformers_to_the_bit(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(**PRESETS[name].to_hf())).inv_freq.numpy()
    np.testing.assert_array_equal(inverse_frequencies(PRESETS[name]), theirs)
