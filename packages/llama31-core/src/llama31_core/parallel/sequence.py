"""How a sequence is cut over context-parallel ranks, and what each computes at every step of a ring. No tensors.

A sequence is cut into 2 * cp pieces; rank r has piece r and, from the end, piece 2 * cp - 1 - r. With causal attention
the first pieces have little to look at and the last ones much, so that this way every rank has as much to do (as in
Llama 3's training, Dubey et al. 2024, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.training.batch import Batch
from llama31_core.training.masks import bias

Pieces = tuple[int, int]
_BOTH, _FIRST, _LAST = (0, 2), (0, 1), (1, 2)


@dataclass(frozen=True)
class RingStep:
    """Which of a rank's two pieces of queries look at which of another's two pieces of keys.

    Attributes:
        source: the place in the group of the rank whose keys they are.
        queries, keys: from which of the two pieces to which, as a slice's start and stop.
    """

    source: int
    queries: Pieces
    keys: Pieces


def token_order(num_tokens: int, cp: int) -> list[npt.NDArray[np.int64]]:
    """The places in a sequence of the tokens that each rank of a cp group has, in the rank's order.

    Raises:
        ConfigError: the sequence cannot be cut into 2 * cp pieces of one length.
    """
    if cp == 1:
        return [np.arange(num_tokens)]
    if num_tokens % (2 * cp):
        near = max(1, round(num_tokens / (2 * cp))) * 2 * cp
        raise ConfigError(
            f"seq_length={num_tokens} cannot be cut into 2 x cp = {2 * cp} equal pieces; the nearest length is {near}"
        )
    pieces = np.arange(num_tokens).reshape(2 * cp, -1)
    return [np.concatenate((pieces[rank], pieces[2 * cp - 1 - rank])) for rank in range(cp)]


def check_sequence(parallel: ParallelConfig, num_tokens: int) -> None:
    """Raise ConfigError if sequences of this length do not divide over cp, and over tp with sequence parallelism."""
    own = len(token_order(num_tokens, parallel.cp)[0])
    if parallel.sequence_parallel and own % parallel.tp:
        near = max(1, round(own / parallel.tp)) * parallel.tp * parallel.cp
        raise ConfigError(
            f"use_seq_parallel: the {own} tokens that a rank has of seq_length={num_tokens} do not divide by "
            f"tp={parallel.tp}; the nearest seq_length is {near}"
        )


def plan_ring(index: int, cp: int) -> list[RingStep]:
    """What a rank computes at every step; at step s it has the keys of rank `(index - s) % cp`.

    Own keys come first, under a causal mask. Of a rank before this one the first piece of keys is seen by all queries
    and the last by none; a rank after this one has keys that the last piece of queries sees, all of them. So every
    step of every rank is as much work: two pairs of pieces.
    """
    sources = [(index - step) % cp for step in range(cp)]
    others = [RingStep(s, _BOTH, _FIRST) if s < index else RingStep(s, _LAST, _BOTH) for s in sources[1:]]
    return [RingStep(index, _BOTH, _BOTH), *others]


def ring_biases(segment_ids_BT: npt.NDArray[np.int32], index: int, cp: int) -> list[npt.NDArray[np.float32]]:
    """What is added to the scores of each step.

    Args:
        segment_ids_BT: of whole sequences.
    """
    order = token_order(segment_ids_BT.shape[1], cp)
    biases = []
    for step in plan_ring(index, cp):
        queries, keys = _cut(order[index], step.queries), _cut(order[step.source], step.keys)
        biases.append(bias(segment_ids_BT, queries, keys))
    return biases


def _cut(places: npt.NDArray[np.int64], pieces: Pieces) -> npt.NDArray[np.int64]:
    half = len(places) // 2
    return places[pieces[0] * half : pieces[1] * half]


def own_tokens(batch: Batch, index: int, cp: int) -> Batch:
    """A rank's tokens of a batch of whole sequences; segment ids stay those of the whole sequences."""
    if cp == 1:
        return batch
    order = token_order(batch.tokens.shape[1], cp)[index]
    tokens, labels, positions = (
        np.ascontiguousarray(array[:, order]) for array in (batch.tokens, batch.labels, batch.positions)
    )
    return replace(batch, tokens=tokens, labels=labels, positions=positions)
