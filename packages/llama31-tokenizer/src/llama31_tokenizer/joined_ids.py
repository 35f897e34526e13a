"""Ids of several texts in one array, and what callers make of them: arrays end to end, counts, lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_Ids = npt.NDArray[np.int32]
_Counts = npt.NDArray[np.int64]

_LONG = 1000  # ids of a text for which an array of its own pays: what it takes from then is still in the cache


@dataclass(frozen=True)
class JoinedIds:
    """Ids of T texts in order, with an id between two of them that belongs to none, or without.

    Attributes:
        ids: (N,).
        starts, stops: where each text's begin and end, (T,).
    """

    ids: _Ids
    starts: _Counts
    stops: _Counts

    @classmethod
    def end_to_end(cls, ids: _Ids, lengths: _Counts) -> JoinedIds:
        """With nothing between them."""
        stops = np.cumsum(lengths)
        return cls(ids, stops - lengths, stops)

    @classmethod
    def separated(cls, ids: _Ids, separator: int) -> JoinedIds:
        """With an id between them that none of them has."""
        between = np.flatnonzero(ids == separator)
        return cls(ids, np.concatenate([[0], between + 1]), np.concatenate([between, [len(ids)]]))

    @classmethod
    def joined(cls, parts: Sequence[JoinedIds]) -> JoinedIds:
        """Those of several in order, one or more."""
        if len(parts) == 1:
            return parts[0]
        before = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
        starts, stops = (
            np.concatenate([array + offset for array, offset in zip(arrays, before, strict=True)])
            for arrays in ([part.starts for part in parts], [part.stops for part in parts])
        )
        return cls(np.concatenate([part.ids for part in parts]), starts, stops)

    @property
    def lengths(self) -> _Counts:
        """How many each text has, (T,)."""
        return self.stops - self.starts

    def without_separators(self) -> _Ids:
        """The texts' ids end to end, which the caller may change."""
        between = self.stops[:-1][self.stops[:-1] < self.starts[1:]]
        return np.delete(self.ids, between) if len(between) else np.require(self.ids, requirements="W")

    def to_lists(self, vocab_size: int) -> list[list[int]]:
        """A list of each text's ids."""
        rows: list[list[int]] = [[] for _ in self.starts]
        self.fill(rows, vocab_size)
        return rows

    def fill(self, rows: Sequence[list[int]], vocab_size: int) -> None:
        """Add each text's ids, all below `vocab_size`, to a list, as ints that are made once.

        That takes half the time of new ones, and less memory.
        """
        objects = _int_objects(vocab_size)
        spans = zip(rows, self.starts.tolist(), self.stops.tolist(), strict=True)
        indexes = self.ids.astype(np.intp)
        if len(indexes) >= _LONG * len(self.starts):
            for row, start, stop in spans:
                row += objects.take(indexes[start:stop]).tolist()
        else:
            made = objects.take(indexes)
            for row, start, stop in spans:
                row += made[start:stop].tolist()


@lru_cache(maxsize=8)
def _int_objects(count: int) -> npt.NDArray[np.object_]:
    return np.arange(count).astype(object)
