"""Choosing the next token: one row of logits and what was said before in, a token id and its log-probability out.

Plain NumPy on the host, one generator per request, so that a seed gives the same tokens whatever else is in the batch.
The order is that of transformers' generation: penalties, biases and bans, temperature, top_k, top_p, min_p, typical_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama31_core.inference.sampling_params import SamplingParams

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of the model's own distribution: of the drawn token, and of the likeliest, in order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one request.

    Args:
        params: of the request.
        stop_ids: what would end it, for `min_tokens`.
    """

    def __init__(self, params: SamplingParams, stop_ids: frozenset[int] = frozenset()) -> None:
        self._params = params
        self._stop_ids = np.array(sorted(stop_ids), np.int64)
        self._rng = None if params.temperature == 0 else np.random.default_rng(params.seed)

    def draw(self, logits_V: npt.NDArray[np.float32], prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """The next token id, given the logits (V,) of the last token and all tokens so far."""
        scores = self.adjust(logits_V, prompt_ids, output_ids)
        if self._rng is None:
            return int(np.argmax(scores))
        ids, probabilities = candidates(scores, self._params)
        drawn = np.searchsorted(np.cumsum(probabilities), self._rng.random(), side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])  # rounding may leave the last sum just under 1

    def logprobs(self, logits_V: npt.NDArray[np.float32], token: int) -> TokenLogprobs | None:
        """The report on a drawn token, if the request wants one."""
        count = self._params.logprobs
        if count is None:
            return None
        scores = logits_V.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        likeliest = np.argsort(-scores, kind="stable")[:count]
        return TokenLogprobs(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in likeliest))

    def adjust(
        self, logits_V: npt.NDArray[np.float32], prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> Floats | npt.NDArray[np.float32]:
        """Penalties, biases and bans."""
        params = self._params
        too_early = len(output_ids) < params.min_tokens
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if not (penalised or params.logit_bias or params.bad_words_ids or too_early):
            return logits_V
        scores = logits_V.astype(np.float64)
        if params.repetition_penalty != 1:
            seen = np.unique(np.array([*prompt_ids, *output_ids], np.int64))
            factor = np.where(scores[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            scores[seen] *= factor
        if (params.presence_penalty or params.frequency_penalty) and output_ids:
            said, counts = np.unique(np.array(output_ids, np.int64), return_counts=True)
            scores[said] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        if params.bad_words_ids:
            tokens = (*prompt_ids, *output_ids)
            for *beginning, last in params.bad_words_ids:
                if not beginning or tokens[-len(beginning) :] == tuple(beginning):
                    scores[last] = -np.inf
        if too_early:
            scores[self._stop_ids] = -np.inf
        return scores


def candidates(scores_V: Floats | npt.NDArray[np.float32], params: SamplingParams) -> tuple[Ids, Floats]:
    """The tokens that may be drawn, most likely first, and their probabilities (which sum to 1).

    Each filter works on what the one before left, with probabilities that sum to 1 again.
    """
    scores = scores_V.astype(np.float64) / params.temperature
    ids = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        ids = np.argpartition(-scores, params.top_k - 1)[: params.top_k]
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    weights = np.exp(scores[ids] - scores[ids[0]])
    probabilities = weights / weights.sum()
    if params.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        ids, probabilities = _keep(before < params.top_p, ids, probabilities)
    if params.min_p > 0:
        ids, probabilities = _keep(probabilities >= params.min_p * probabilities[0], ids, probabilities)
    if params.typical_p < 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probabilities)
            entropy = np.nansum(probabilities * surprise)
        order = np.argsort(np.abs(surprise - entropy), kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        typical = np.zeros(len(ids), bool)
        typical[order] = before < params.typical_p
        ids, probabilities = _keep(typical, ids, probabilities)
    return ids, probabilities


def _keep(kept: npt.NDArray[np.bool_], ids: Ids, probabilities: Floats) -> tuple[Ids, Floats]:
    return ids[kept], probabilities[kept] / probabilities[kept].sum()
