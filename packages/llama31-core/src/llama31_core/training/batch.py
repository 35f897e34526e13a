"""What a training step computes on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens with the labels that they predict; B sequences, T tokens.

    Attributes:
        tokens: ids (B, T).
        labels: (B, T), the id that is to follow each token, or -100.
        positions: (B, T), from 0 in every document.
        segment_ids: (B, T), which document of its sequence a token belongs to; it sees no other.
        record_numbers: (B,), which records of the data these are.
    """

    tokens: IntArray
    labels: IntArray
    positions: IntArray
    segment_ids: IntArray
    record_numbers: tuple[int, ...] = ()

    @classmethod
    def unpacked(cls, tokens: IntArray, labels: IntArray, record_numbers: tuple[int, ...] = ()) -> Batch:
        """One document a sequence."""
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return cls(tokens, labels, np.ascontiguousarray(positions), np.zeros_like(tokens), record_numbers)
