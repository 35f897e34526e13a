"""The two orders of rotary rows: a whole number of heads in, the same rows in the other order out.

Meta's reference and GGUF turn neighbouring rows of a head as pairs: (0, 1), (2, 3), …. HF and MindFormers turn row i
with row i + head_dim/2. So wq and wk of the former must be permuted within each head
(transformers `models/llama/convert_llama_weights_to_hf.py`, llama.cpp `LlamaModel.permute`).
"""

from __future__ import annotations

from collections.abc import Callable

from llama31_core.checkpoint.dtypes import Array


def to_half_split(rows: Array, head_dim: int) -> Array:
    """Rows of Meta's or GGUF's order -> HF's order; `rows` is (heads * head_dim, …)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_half_split(read_rows: Callable[[int, int], Array], start: int, stop: int, head_dim: int) -> Array:
    """Rows from `start` to `stop` in HF's order; `read_rows` is asked for whole heads in the other one."""
    first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
    return to_half_split(read_rows(first, last), head_dim)[start - first : stop - first]


def to_interleaved(rows: Array, head_dim: int) -> Array:
    """The inverse of `to_half_split`."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
