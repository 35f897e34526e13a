"""Arrays of ids to lists, and to those of several texts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


def to_list(ids: npt.NDArray[np.int32], vocab_size: int) -> list[int]:
    """The ids (N,), all below `vocab_size`, as ints that are made once: half the time of new ones, and less memory."""
    made: list[int] = _int_objects(vocab_size).take(ids).tolist()
    return made


@lru_cache(maxsize=8)
def _int_objects(count: int) -> npt.NDArray[np.object_]:
    return np.arange(count).astype(object)


def part_at(ids: npt.NDArray[np.int32], separator: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Ids (N,) of texts with a separator between them: the ids without it, and how many each text has."""
    separators = np.flatnonzero(ids == separator)
    lengths = np.diff(np.concatenate([[-1], separators, [len(ids)]])) - 1
    return np.delete(ids, separators) if len(separators) else ids, lengths
