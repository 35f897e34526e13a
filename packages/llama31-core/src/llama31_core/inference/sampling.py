"""Choosing the next token: one row of logits and what was said before in, a token id and its log-probability out.

Plain NumPy on the host, one generator per request, so that a seed gives the same tokens whatever else is in the batch.
The order is that of transformers' generation: penalties, biases and bans, temperature, top_k, top_p, min_p, typical_p.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama31_core.errors import SamplingError
from llama31_core.inference.sampling_params import SamplingParams

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
_FEW = 256  # tokens that a nucleus is looked for among, before more are sorted


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of the model's own distribution: of one token, and of the likeliest, in order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits_V: npt.NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
        """The report on `token` and the `count` likeliest ones, given the logits (V,)."""
        scores = log_softmax(logits_V)
        likeliest = _largest(scores, count)[:count] if count else ()
        return cls(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in likeliest))


class Sampler:
    """Draws the tokens of one completion.

    Each token takes one uniform number of the request's own generator and turns it into a token by the distribution
    alone. So a token depends on the seed, its position and the logits: neither on what else is in the batch, nor on
    what was guessed for it. A guess made with the same number agrees as often as the distributions do.

    Args:
        params: of the request.
        stop_ids: what would end it, for `min_tokens`.
        index: of the completion; it draws with the seed of the request + index.
    """

    def __init__(self, params: SamplingParams, stop_ids: frozenset[int] = frozenset(), index: int = 0) -> None:
        self._params = params
        self._stop_ids = np.array(sorted(stop_ids), np.int64)
        seed = None if params.seed is None else params.seed + index
        self._rng = None if params.temperature == 0 else np.random.default_rng(seed)
        self._uniforms: deque[float] = deque()  # of the next tokens, as far as guesses have asked for them
        self._prompt_ids: Ids | None = None
        self._mask = None if params.logits_mask is None else params.logits_mask()
        self.takes_argmax = self._rng is None and self._mask is None and not self._adjusts(0)

    def draw(self, logits_V: npt.NDArray[np.float32], prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """The next token id, given the logits (V,) of the last token and all tokens so far.

        Raises:
            SamplingError: the logits are not numbers, or no token is left to draw.
        """
        scores = self.adjust(logits_V, prompt_ids, output_ids)
        if self._mask is not None:
            scores = np.where(self._allowed(len(scores)), scores, -np.inf)
        token = self._choose(scores, 0)
        if self._uniforms:
            self._uniforms.popleft()
        return token

    def guess(
        self, logits_V: npt.NDArray[np.float32], prompt_ids: Sequence[int], output_ids: Sequence[int], ahead: int
    ) -> int:
        """What `draw` would give for the token `ahead` places after the next one, if these were its logits."""
        return self._choose(self.adjust(logits_V, prompt_ids, output_ids), ahead)

    def accept(self, token: int) -> bool:
        """Note that a drawn token is part of the completion; true if nothing may follow it."""
        if self._mask is None:
            return False
        self._mask.accept(token)
        return self._mask.terminated

    def logprobs(self, logits_V: npt.NDArray[np.float32], token: int) -> TokenLogprobs | None:
        """The report on a drawn token, if the request wants one."""
        count = self._params.logprobs
        return None if count is None else TokenLogprobs.of(logits_V, token, count)

    def _choose(self, scores_V: Floats | npt.NDArray[np.float32], ahead: int) -> int:
        best = int(np.argmax(scores_V))  # the first that is not a number, if there is one
        check_best(float(scores_V[best]))
        if self._rng is None:
            return best
        while len(self._uniforms) <= ahead:
            self._uniforms.append(float(self._rng.random()))
        ids, probabilities = candidates(scores_V, self._params)
        drawn = np.searchsorted(np.cumsum(probabilities), self._uniforms[ahead], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])  # rounding may leave the last sum just under 1

    def _allowed(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        assert self._mask is not None
        allowed = self._mask.allowed()
        if len(allowed) != vocab_size:
            raise SamplingError(f"the mask has {len(allowed)} tokens, the model {vocab_size}; build it for this model")
        return allowed

    def _adjusts(self, num_output: int) -> bool:
        params = self._params
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        return bool(penalised or params.logit_bias or params.bad_words_ids or num_output < params.min_tokens)

    def adjust(
        self, logits_V: Floats | npt.NDArray[np.float32], prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> Floats | npt.NDArray[np.float32]:
        """Penalties, biases and bans."""
        params = self._params
        if not self._adjusts(len(output_ids)):
            return logits_V
        scores = logits_V.astype(np.float64)
        if params.repetition_penalty != 1:
            if self._prompt_ids is None:  # found once: prompts are long
                self._prompt_ids = np.unique(np.array(prompt_ids, np.int64))
            seen = np.union1d(self._prompt_ids, np.array(output_ids, np.int64))
            factor = np.where(scores[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            scores[seen] *= factor
        if (params.presence_penalty or params.frequency_penalty) and output_ids:
            said, counts = np.unique(np.array(output_ids, np.int64), return_counts=True)
            scores[said] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        if params.bad_words_ids:
            longest = max(map(len, params.bad_words_ids))
            tokens = (*prompt_ids[-longest:], *output_ids[-longest:])
            for *beginning, last in params.bad_words_ids:
                if not beginning or tokens[-len(beginning) :] == tuple(beginning):
                    scores[last] = -np.inf
        if len(output_ids) < params.min_tokens:
            scores[self._stop_ids] = -np.inf
        return scores


def check_best(score: float) -> None:
    """Refuse logits of which this is the largest (the first that is not a number, if there is one)."""
    if math.isnan(score) or score == math.inf:
        raise SamplingError(f"the model gave {score} among the logits; its weights or its input are damaged")
    if score == -math.inf:
        raise SamplingError("every token is banned (bad words, min_tokens or the mask); no completion is possible")


def log_softmax(scores: Floats | npt.NDArray[np.float32]) -> Floats:
    """Log-probabilities over the last axis."""
    shifted = scores.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def candidates(scores_V: Floats | npt.NDArray[np.float32], params: SamplingParams) -> tuple[Ids, Floats]:
    """The tokens that may be drawn and their probabilities (which sum to 1), in an order that depends on these alone.

    Each filter works on what the one before left, with probabilities that sum to 1 again.
    """
    scores = scores_V.astype(np.float64) / params.temperature
    ids = np.flatnonzero(scores > -np.inf)  # what a ban or a mask leaves
    scores = scores[ids]
    if 0 < params.top_k < len(ids):
        kept = np.argpartition(-scores, params.top_k - 1)[: params.top_k]
        ids, scores = ids[kept], scores[kept]
    weights = np.exp(scores - scores.max())
    probabilities = weights / weights.sum()
    if params.top_p < 1:
        ids, probabilities = _keep(_nucleus(probabilities, params.top_p), ids, probabilities)
    if params.min_p > 0:
        ids, probabilities = _keep(probabilities >= params.min_p * probabilities.max(), ids, probabilities)
    if params.typical_p < 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probabilities)
            entropy = np.nansum(probabilities * surprise)
        order = np.argsort(np.abs(surprise - entropy), kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        ids, probabilities = _keep(order[before < params.typical_p], ids, probabilities)
    return ids, probabilities


def _nucleus(probabilities: Floats, top_p: float) -> Ids:
    """The fewest indexes whose probabilities reach `top_p`, likeliest first. Sorts as few as it can."""
    count = _FEW
    while True:
        head = _largest(probabilities, count)
        sums = np.cumsum(probabilities[head])
        if sums[-1] >= top_p or len(head) == len(probabilities):
            nucleus: Ids = head[sums - probabilities[head] < top_p]
            return nucleus
        count *= 8


def _largest(values: Floats, count: int) -> Ids:
    """Indexes of the `count` largest values and of those that equal the least of them, largest first."""
    head = np.arange(len(values))
    if count < len(values):
        border = np.partition(values, len(values) - count)[len(values) - count]
        head = np.flatnonzero(values >= border)
    largest: Ids = head[np.argsort(-values[head], kind="stable")]
    return largest


def _keep(kept: npt.NDArray[np.bool_] | Ids, ids: Ids, probabilities: Floats) -> tuple[Ids, Floats]:
    return ids[kept], probabilities[kept] / probabilities[kept].sum()
