"""The published architectures by name, and a tiny one for tests."""

from __future__ import annotations

from typing import Any

from llama31_core.config import ModelConfig, RopeScaling


def _llama3(dim: int, layers: int, heads: int, ffn_dim: int, *, scaling: float = 8.0, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=8,
        ffn_dim=ffn_dim,
        rope_scaling=RopeScaling(factor=scaling),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        pad_token_id=128004,
        **more,
    )


PRESETS: dict[str, ModelConfig] = {
    "llama3.1-8b": _llama3(4096, 32, 32, 14336),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, scaling=32.0, tie_word_embeddings=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, scaling=32.0, tie_word_embeddings=True),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        ffn_dim=1536,
        rope_theta=100000.0,
        max_seq_len=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=160,
        rope_scaling=RopeScaling(original_max_seq_len=64),
        max_seq_len=512,
    ),
}
