"""The architecture a GGUF file describes: header in, `ModelConfig` out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from llama31_ckpt.gguf_format.header import GgufHeader
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD, spell
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.errors import CheckpointError

_ROPE_FACTORS = "rope_freqs.weight"
_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_config(file: OpenFile, header: GgufHeader) -> ModelConfig:
    """The configuration of a GGUF file of architecture llama.

    Raises:
        CheckpointError: another architecture, a missing key, or a form of RoPE that this model does not have.
        ConfigError: values that contradict each other.
    """
    name = _get(header, "general.architecture", str)
    if name != "llama":
        raise CheckpointError(f"{header.path}: general.architecture is {name!r}, allowed is 'llama'")
    if header.metadata.get("llama.expert_count"):
        raise CheckpointError(f"{header.path} is a mixture of experts (llama.expert_count), which Llama 3.1 is not")
    embedding = header.tensors.get(spell(EMBEDDING, "gguf"))
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path} has no token embedding matrix ({spell(EMBEDDING, 'gguf')})")
    n_heads = _get(header, "llama.attention.head_count", int)
    n_kv_heads = _kv_heads(header, n_heads)
    dim = _get(header, "llama.embedding_length", int)
    head_dim = header.metadata.get("llama.attention.key_length") or dim // max(1, n_heads)
    rotated = header.metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(
            f"{header.path}: llama.rope.dimension_count is {rotated}, this model turns all {head_dim}"
        )
    theta = _as_written(header.metadata.get("llama.rope.freq_base", 10000.0))
    eos = dict.fromkeys(header.metadata[key] for key in _EOS_KEYS if key in header.metadata)
    return ModelConfig.build(
        str(header.path),
        vocab_size=embedding.shape[0],
        dim=dim,
        n_layers=_get(header, "llama.block_count", int),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=_get(header, "llama.feed_forward_length", int),
        norm_eps=_as_written(_get(header, "llama.attention.layer_norm_rms_epsilon", float)),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, header, head_dim, theta),
        max_seq_len=_get(header, "llama.context_length", int),
        tie_word_embeddings=spell(LM_HEAD, "gguf") not in header.tensors,
        bos_token_id=header.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(eos),
        pad_token_id=header.metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _get(header: GgufHeader, key: str, kind: type) -> Any:
    value = header.metadata.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{header.path}: metadata {key} is {value!r}, expected {kind.__name__}")
    return value


def _kv_heads(header: GgufHeader, n_heads: int) -> int:
    value = header.metadata.get("llama.attention.head_count_kv", n_heads)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise CheckpointError(
            f"{header.path}: llama.attention.head_count_kv is {value!r}, expected one number for all layers"
        )
    return value


def _as_written(value: float) -> float:
    """The decimal that was stored as float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: OpenFile, header: GgufHeader, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3.1's scaling, which a GGUF file holds as a tensor of frequency divisors and not as its parameters."""
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "llama3"):
        raise CheckpointError(f"{header.path}: llama.rope.scaling.type is {kind!r}, allowed are 'none' and 'llama3'")
    tensor = header.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.kind != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{header.path}: {_ROPE_FACTORS} is {tensor.kind.name} {tensor.shape}, expected F32")
    factors = np.frombuffer(file.read(tensor.offset, tensor.size_bytes), np.float32)
    if np.all(factors == 1.0):
        return None
    for original in (8192, 4096, 2048, 16384, 32768):
        candidate = RopeScaling(factor=max(1.0, round(float(factors.max()), 4)), original_max_seq_len=original)
        if np.allclose(_frequency_divisors(candidate, head_dim, theta), factors, rtol=1e-4):
            return candidate
    raise CheckpointError(
        f"{header.path}: {_ROPE_FACTORS} is no scaling of Llama 3.1's form (factors {factors.min()} to {factors.max()})"
    )


def _frequency_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> Array:
    """By what Llama 3.1 divides each rotary frequency (Meta's `apply_scaling`); shape (head_dim / 2,)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_seq_len / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)
