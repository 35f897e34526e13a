"""What a model's matrices are multiplied with on real text: layer by layer in NumPy, so that one layer is in memory.

Shapes: S sequences, T tokens of each, E = dim, H query heads, K key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError
from llama31_core.rope_frequencies import inverse_frequencies

Floats = npt.NDArray[np.float32]
Moments = npt.NDArray[np.float64]
# The input that a matrix shares with others, by the name of the first of them; in the order of checkpoints.
INPUT_OF = {
    "attention.wq": "attention.wq",
    "attention.wk": "attention.wq",
    "attention.wv": "attention.wq",
    "attention.wo": "attention.wo",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w1",
}


def read_tokens(text: Path, model_dir: Path, num_sequences: int, length: int) -> npt.NDArray[np.int64]:
    """Ids (S, T) from a text file, cut into pieces spread evenly over it.

    Raises:
        CheckpointError: the file cannot be read, or has too few tokens for one piece.
    """
    from llama31_tokenizer import Tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"calibration text {text} cannot be read: {error}") from error
    ids = np.array(Tokenizer.from_pretrained(model_dir).encode(content), np.int64)
    if len(ids) < length:
        raise CheckpointError(f"calibration text {text} has {len(ids)} tokens, at least {length} are needed")
    count = min(num_sequences, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts])


class Calibration:
    """The residual stream of some texts, carried through a model one layer at a time.

    Args:
        config: the architecture.
        embedded: (S, T, E), the tokens' vectors.
    """

    def __init__(self, config: ModelConfig, embedded: Floats) -> None:
        self.config = config
        self._stream = embedded
        angles = np.arange(embedded.shape[1], dtype=np.float32)[:, None] * inverse_frequencies(config)
        self._cosines, self._sines = np.cos(angles), np.sin(angles)

    def observe(self, layer: Mapping[str, Floats]) -> dict[str, Moments]:
        """Second moments X^T X of the inputs of a layer's matrices, by the names of `INPUT_OF`."""
        moments: dict[str, Moments] = {}

        def keep(name: str, rows: Floats) -> None:
            moments[name] = (rows.T @ rows).astype(np.float64)

        self._run(layer, keep)
        return moments

    def advance(self, layer: Mapping[str, Floats]) -> None:
        """Go through a layer with these weights."""
        self._stream = self._run(layer, lambda name, rows: None)

    def _run(self, layer: Mapping[str, Floats], keep: Callable[[str, Floats], None]) -> Floats:
        def multiply(x_STI: Floats, *names: str) -> list[Floats]:
            rows = x_STI.reshape(-1, x_STI.shape[-1])
            keep(names[0], rows)
            return [(rows @ layer[name].T).reshape(*x_STI.shape[:-1], -1) for name in names]

        x_STE = self._stream
        queries, keys, values = multiply(
            self._norm(x_STE, layer["attention_norm"]), "attention.wq", "attention.wk", "attention.wv"
        )
        x_STE = x_STE + multiply(self._attend(queries, keys, values), "attention.wo")[0]
        gate, up = multiply(self._norm(x_STE, layer["ffn_norm"]), "feed_forward.w1", "feed_forward.w3")
        return x_STE + multiply(gate / (1 + np.exp(-gate)) * up, "feed_forward.w2")[0]

    def _norm(self, x_STE: Floats, weight: Floats) -> Floats:
        squares = np.mean(x_STE**2, axis=-1, keepdims=True)
        return np.asarray(x_STE / np.sqrt(squares + self.config.norm_eps) * weight, np.float32)

    def _attend(self, queries: Floats, keys: Floats, values: Floats) -> Floats:
        config, (sequences, tokens, _) = self.config, queries.shape
        q_SHTD, k_SKTD, v_SKTD = (
            part.reshape(sequences, tokens, -1, config.head_dim).transpose(0, 2, 1, 3)
            for part in (queries, keys, values)
        )
        q_SHTD, k_SKTD = self._turn(q_SHTD), self._turn(k_SKTD)
        hidden_TT = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
        mixed = np.empty_like(q_SHTD)
        group = config.n_heads // config.n_kv_heads
        for head in range(config.n_heads):
            scores = (
                q_SHTD[:, head] @ k_SKTD[:, head // group].transpose(0, 2, 1) / np.sqrt(np.float32(config.head_dim))
            )
            scores += hidden_TT
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v_SKTD[:, head // group]
        return mixed.transpose(0, 2, 1, 3).reshape(sequences, tokens, -1)

    def _turn(self, x_SHTD: Floats) -> Floats:
        half = x_SHTD.shape[-1] // 2
        first, second = x_SHTD[..., :half], x_SHTD[..., half:]
        turned = (first * self._cosines - second * self._sines, second * self._cosines + first * self._sines)
        return np.concatenate(turned, axis=-1)
