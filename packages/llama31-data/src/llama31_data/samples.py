"""Many samples as three arrays, and the two things done to all of them: joined from lists, and cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Encoded(NamedTuple):
    """One sample: its ids and the [start, stop) ranges to train on, each end-of-turn included."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass
class Samples:
    """Samples end to end.

    Attributes:
        tokens: int32, (total,).
        trained: bool, (total,); whether a token is a target. The first of a sample never is: nothing predicts it.
        lengths: int32, (samples,); none is 0, they add up to total.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int32]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of the first token of each sample."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def count_trained(self) -> NDArray[np.int64]:
        """Targets in each sample."""
        if not len(self.lengths):
            return np.zeros(0, np.int64)
        counts: NDArray[np.int64] = np.add.reduceat(self.trained, self.starts, dtype=np.int64)
        return counts


def join_samples(samples: Sequence[Encoded]) -> Samples:
    """Samples of lists as arrays."""
    lengths = np.array([len(sample.ids) for sample in samples], np.int32)
    tokens = np.array([token for sample in samples for token in sample.ids], np.int32)
    trained = np.zeros(len(tokens), np.bool_)
    base = 0
    for ids, spans in samples:
        for start, stop in spans:
            trained[base + start : base + stop] = True
        base += len(ids)
    return _without_firsts(Samples(tokens, trained, lengths))


def _without_firsts(samples: Samples) -> Samples:
    samples.trained[samples.starts] = False
    return samples


class Fitted(NamedTuple):
    """Samples within a length.

    Attributes:
        origins: which sample each one comes from, (samples,).
        lost: samples that are gone, with the reason.
        counts: truncated, split, dropped_tokens.
    """

    samples: Samples
    lost: list[tuple[int, str]]
    counts: dict[str, int]


def fit_samples(samples: Samples, limit: int | None, *, split: bool) -> Fitted:
    """Cuts samples to at most `limit` tokens, off their end or (split) into several. None is left without a target."""
    lengths, targets = samples.lengths, samples.count_trained()
    if (limit is None or not (lengths > limit).any()) and targets.all():
        return Fitted(samples, [], {})
    tokens: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    lost: list[tuple[int, str]] = []
    counts = {"truncated": 0, "split": 0, "dropped_tokens": 0}
    for number, (start, length) in enumerate(zip(samples.starts.tolist(), lengths.tolist(), strict=True)):
        is_long = limit is not None and length > limit
        step = limit if is_long and limit is not None else length
        cuts = range(start, start + length if split or not is_long else start + 1, step)
        ends = [min(cut + step, start + length) for cut in cuts]
        kept = [(cut, end) for cut, end in zip(cuts, ends, strict=True) if samples.trained[cut + 1 : end].any()]
        if not kept:
            lost.append((number, _why_lost(limit, length) if is_long else _NO_TARGET))
            continue
        if is_long:
            counts["split" if split else "truncated"] += 1
            counts["dropped_tokens"] += length - sum(end - cut for cut, end in kept)
        tokens += [samples.tokens[cut:end] for cut, end in kept]
        trained += [samples.trained[cut:end] for cut, end in kept]
    kept_lengths = np.array([len(part) for part in tokens], np.int32)
    if not tokens:
        return Fitted(join_samples([]), lost, counts)
    fitted = Samples(np.concatenate(tokens), np.concatenate(trained), kept_lengths)
    return Fitted(_without_firsts(fitted), lost, counts)


_NO_TARGET = "its answers are empty and the template has no end of turn: nothing to train on"


def _why_lost(limit: int | None, length: int) -> str:
    return f"its first {limit} tokens (seq_length + 1) have no answer in them, of {length} in all"
