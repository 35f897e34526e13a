"""Small checkpoints made on the fly: one set of random tensors in whatever format a test needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama31_ckpt.rotary import to_interleaved
from llama31_core.checkpoint import parameter_shapes, rotary_heads, save_weights, spell
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig

Tensors = dict[str, Array]


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.preset("tiny")


@pytest.fixture
def tensors(config: ModelConfig) -> Tensors:
    rng = np.random.default_rng(11)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in parameter_shapes(config).items()}


@pytest.fixture
def hf_dir(config: ModelConfig, tensors: Tensors, tmp_path: Path) -> Path:
    """An HF directory: config.json and model.safetensors with HF's names."""
    path = tmp_path / "hf"
    config.save_pretrained(path)
    save_weights(path, ((spell(name, "hf"), array) for name, array in tensors.items()))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


GgufBuilder = Callable[..., Path]


@pytest.fixture
def build_gguf(config: ModelConfig, tensors: Tensors, tmp_path: Path) -> GgufBuilder:
    """Writes a GGUF file with the gguf library, by default a valid one of the tiny config."""

    def build(
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        metadata: dict[str, Any] | None = None,
        extra: Tensors | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        path = tmp_path / name
        file = gguf.GGUFWriter(str(path), "llama")
        values = {
            "llama.block_count": config.n_layers,
            "llama.context_length": config.max_seq_len,
            "llama.embedding_length": config.dim,
            "llama.feed_forward_length": config.ffn_dim,
            "llama.attention.head_count": config.n_heads,
            "llama.attention.head_count_kv": config.n_kv_heads,
            "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
            "llama.rope.freq_base": config.rope_theta,
            **(metadata or {}),
        }
        for key, value in values.items():
            if isinstance(value, str):
                file.add_string(key, value)
            elif isinstance(value, list):
                file.add_array(key, value)
            elif isinstance(value, float):
                file.add_float32(key, value)
            elif value is not None:
                file.add_uint32(key, value)
        for canonical, array in tensors.items():
            heads = rotary_heads(canonical)
            stored = array if heads is None else to_interleaved(array, config.head_dim)
            if array.ndim == 1 or array.shape[-1] % 32:
                file.add_tensor(spell(canonical, "gguf"), stored)
            else:
                data = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
                file.add_tensor(spell(canonical, "gguf"), data, raw_dtype=kind)
        for stored_name, array in (extra or {}).items():
            file.add_tensor(stored_name, array)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        return path

    return build
