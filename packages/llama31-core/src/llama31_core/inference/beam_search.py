"""Beam search as pure bookkeeping: log-probabilities of every running beam in, which beam goes on by which token out.

The rules are those of transformers' `generate` (generation/utils.py, `_beam_search`): of the best candidates as many as
there are beams may end one, and the best that do not end go on; ended ones are ranked by their log-probability over a
power of their length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class EndedBeam:
    """Tokens (without the one that ended them), rank score, and whether a stop token ended them."""

    token_ids: list[int]
    score: float
    stopped: bool


@dataclass
class BeamSearch:
    """The beams of one request.

    Attributes:
        num_beams: beams that run.
        stop_ids: what ends a beam.
        max_tokens: tokens of a beam at most.
        length_penalty, early_stopping: see `SamplingParams`.
        ended: the best ended beams so far, best first.
    """

    num_beams: int
    stop_ids: frozenset[int]
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ended: list[EndedBeam] = field(default_factory=list)
    is_done: bool = False
    _running: list[list[int]] = field(default_factory=lambda: [[]])
    _scores: list[float] = field(default_factory=lambda: [0.0])

    def advance(self, log_probs_BV: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
        """Take one step: the first time with one row, then with one for each running beam.

        Returns:
            For every beam that runs next: the row it comes from, and its new token.
        """
        total_BV = log_probs_BV + np.array(self._scores)[:, None]
        num_kept = min(max(2, 1 + len(self.stop_ids)) * self.num_beams, total_BV.size)
        flat = total_BV.reshape(-1)
        best = np.argpartition(-flat, num_kept - 1)[:num_kept]
        best = best[np.lexsort((best, -flat[best]))]
        candidates = [(*divmod(int(index), total_BV.shape[1]), float(flat[index])) for index in best]
        length = len(self._running[0]) + 1
        at_limit = length == self.max_tokens
        for row, token, score in candidates[: self.num_beams]:
            stopped = token in self.stop_ids
            if (stopped or at_limit) and score > -np.inf:
                token_ids = self._running[row] + ([] if stopped else [token])
                self.ended.append(EndedBeam(token_ids, score / length**self.length_penalty, stopped))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self.num_beams]
        going_on = [c for c in candidates if c[1] not in self.stop_ids and c[2] > -np.inf][: self.num_beams]
        self.is_done = at_limit or not going_on or not self._can_improve(going_on[0][2], length)
        self._running = [[*self._running[row], token] for row, token, _ in going_on]
        self._scores = [score for _, _, score in going_on]
        return [(row, token) for row, token, _ in going_on]

    def _can_improve(self, best_score: float, length: int) -> bool:
        if len(self.ended) < self.num_beams:
            return True
        if self.early_stopping is True:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        best_possible = best_score / (self.max_tokens if longest else length) ** self.length_penalty
        return bool(best_possible > self.ended[-1].score)
