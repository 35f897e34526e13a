"""Samples in, records that hold many of them out: first-fit decreasing within a bounded buffer.

Each record has, beside `input_ids` and `labels`, `segment_ids` (1, 2, … for its samples, 0 for padding) so that
attention can stay within a sample, and `position_ids`, which begin at 0 in every sample.

First-fit decreasing: D. S. Johnson, "Near-optimal bin packing algorithms", 1973. Samples of one length are placed
together, which is the same placement and takes time by distinct lengths, not by samples.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama31_data.layouts import IGNORED, Block, GiveChunks, Layout

_BUFFER_RECORDS = 128
_FULL = 0.99
_BLOCK_TOKENS = 1 << 20


class _Buffer(NamedTuple):
    """Samples end to end: tokens and labels (total,), lengths (samples,)."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int32]

    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def take(self, samples: Sequence[int], starts: NDArray[np.int64]) -> _Buffer:
        """Some of the samples, in the order given; `starts` has where each of all begins."""
        chosen = np.array(samples, np.int64)
        lengths = self.lengths[chosen]
        shifts = starts[chosen] - (np.cumsum(lengths, dtype=np.int64) - lengths)
        places = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
        return _Buffer(self.tokens[places], self.labels[places], lengths)


def packed_blocks(samples: GiveChunks, layout: Layout) -> Iterator[Block]:
    """Records of seq_length + 1 tokens. A record still under 99% full waits for what the next buffer brings."""
    width = layout.seq_length + 1
    held: list[_Buffer] = []
    size = 0
    for chunk in samples():
        labels = np.where(chunk.trained, chunk.tokens, np.int32(IGNORED))
        held.append(_Buffer(chunk.tokens, labels, chunk.lengths))
        size += len(chunk.tokens)
        if size >= width * _BUFFER_RECORDS:
            buffer = _joined(held)
            done, left = _full_ones(first_fit_decreasing(buffer.lengths.tolist(), width), buffer, width)
            yield from _blocks(buffer, done, layout)
            held = [buffer.take(left, buffer.starts())]
            size = len(held[0].tokens)
    if held:
        buffer = _joined(held)
        yield from _blocks(buffer, first_fit_decreasing(buffer.lengths.tolist(), width), layout)


def _joined(buffers: list[_Buffer]) -> _Buffer:
    return _Buffer(*(np.concatenate(arrays) for arrays in zip(*buffers, strict=True)))


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`: the longest first, each into the first bin that has room, else into a new one."""
    of_length: dict[int, deque[int]] = defaultdict(deque)
    for index, length in enumerate(lengths):
        of_length[length].append(index)
    bins: list[list[int]] = []
    room: list[int] = []
    for length in sorted(of_length, reverse=True):
        indices = of_length[length]
        for number in range(len(bins)):
            fitting = min(room[number] // length, len(indices)) if room[number] >= length else 0
            if fitting:
                bins[number] += [indices.popleft() for _ in range(fitting)]
                room[number] -= fitting * length
        while indices:
            fitting = min(capacity // length, len(indices))
            bins.append([indices.popleft() for _ in range(fitting)])
            room.append(capacity - fitting * length)
    return bins


def _full_ones(bins: list[list[int]], buffer: _Buffer, width: int) -> tuple[list[list[int]], list[int]]:
    """Bins to write now, and the samples of the others; all bins if fewer than half are full, so that a run goes on."""
    full = [bin for bin in bins if buffer.lengths[bin].sum() >= _FULL * width]
    if 2 * len(full) < len(bins):
        return bins, []
    waiting = np.ones(len(buffer.lengths), np.bool_)
    for bin in full:
        waiting[bin] = False
    return full, np.flatnonzero(waiting).tolist()


def _blocks(buffer: _Buffer, bins: list[list[int]], layout: Layout) -> Iterator[Block]:
    width = layout.seq_length + 1
    starts = buffer.starts()
    step = max(1, _BLOCK_TOKENS // width)
    for first in range(0, len(bins), step):
        part = bins[first : first + step]
        shape = (len(part), width)
        block = {
            "input_ids": np.full(shape, layout.pad_id, np.int32),
            "labels": np.full(shape, IGNORED, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
        }
        for row, bin in enumerate(part):
            tokens, labels, lengths = buffer.take(bin, starts)
            used = len(tokens)
            block["input_ids"][row, :used] = tokens
            block["labels"][row, :used] = labels
            block["segment_ids"][row, :used] = np.repeat(np.arange(1, len(bin) + 1), lengths)
            block["position_ids"][row, :used] = np.arange(used) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield block
