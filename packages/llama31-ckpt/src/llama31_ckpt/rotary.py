"""The two orders of rotary rows: a whole number of heads in, the same rows in the other order out.

Meta's reference and GGUF turn neighbouring rows of a head as pairs: (0, 1), (2, 3), …. HF and MindFormers turn row i
with row i + head_dim/2. So wq and wk of the former must be permuted within each head
(transformers `models/llama/convert_llama_weights_to_hf.py`, llama.cpp `LlamaModel.permute`).
"""

from __future__ import annotations

from llama31_core.checkpoint.dtypes import Array


def to_half_split(rows: Array, head_dim: int) -> Array:
    """Rows of Meta's or GGUF's order -> HF's order; `rows` is (heads * head_dim, …)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_interleaved(rows: Array, head_dim: int) -> Array:
    """The inverse of `to_half_split`."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
