"""Choosing the next token: one row of logits and a request's parameters in, a token id out.

Plain NumPy on the host, one generator per request, so that a seed gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama31_core.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
        max_tokens: tokens to generate at most; None for as many as the context holds.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2019); 1 for all.
        seed: makes sampling repeatable; None draws a fresh one.
        stop_token_ids: end the request, beside the model's own end ids. They are not part of the completion.
        ignore_eos: the model's own end ids do not end the request.

    Raises:
        RequestError: a value outside its range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens is None or _is_int(self.max_tokens, 1), "max_tokens", self.max_tokens, ">= 1 or None")
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, ">= 0")
        _require(_is_int(self.top_k, 0), "top_k", self.top_k, "an integer >= 0 (0 for all)")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.seed is None or _is_int(self.seed, 0), "seed", self.seed, "an integer >= 0 or None")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _require(_is_int(token, 0), "stop_token_ids", token, "token ids >= 0")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise RequestError(f"{name} is {value!r}, allowed is {allowed}")


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._rng = None if params.temperature == 0 else np.random.default_rng(params.seed)

    def draw(self, logits_V: npt.NDArray[np.float32]) -> int:
        """The next token id, given the logits (V,) of the last token."""
        if self._rng is None:
            return int(np.argmax(logits_V))
        ids, probabilities = nucleus(logits_V, self._params)
        return int(
            ids[np.searchsorted(np.cumsum(probabilities), self._rng.random(), side="right").clip(0, len(ids) - 1)]
        )


def nucleus(
    logits_V: npt.NDArray[np.float32], params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, most likely first, and their probabilities (which sum to 1).

    Temperature, then top_k, then top_p, each on what the one before left, as in transformers' generation.
    """
    scores = logits_V.astype(np.float64) / params.temperature
    ids = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        ids = np.argpartition(-scores, params.top_k - 1)[: params.top_k]
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    weights = np.exp(scores[ids] - scores[ids[0]])
    probabilities = weights / weights.sum()
    if params.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        keep = before < params.top_p  # the most likely token always stays
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    return ids, probabilities
