"""Samples in, records that hold many of them out: first-fit decreasing within a bounded buffer.

Each record has, beside `input_ids` and `labels`, `segment_ids` (1, 2, … for its samples, 0 for padding) so that
attention can stay within a sample, and `position_ids`, which begin at 0 in every sample.

First-fit decreasing: D. S. Johnson, "Near-optimal bin packing algorithms", 1973. Samples of one length are placed
together, which is the same placement and takes time by distinct lengths, not by samples.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llama31_data.layouts import IGNORED, Block, Layout, Samples

_BUFFER_RECORDS = 128
_FULL = 0.99
_BLOCK_TOKENS = 1 << 20

_Sample = tuple[NDArray[np.int32], NDArray[np.int32]]  # ids and labels


def packed_blocks(samples: Samples, layout: Layout) -> Iterator[Block]:
    """Records of seq_length + 1 tokens. A record still under 99% full waits for what the next buffer brings."""
    width = layout.seq_length + 1
    waiting: list[_Sample] = []
    size = 0
    for chunk in samples():
        labels = np.where(chunk.trained, chunk.tokens, np.int32(IGNORED))
        ends = np.cumsum(chunk.lengths).tolist()
        for start, stop in zip([0, *ends], ends, strict=False):
            waiting.append((chunk.tokens[start:stop], labels[start:stop]))
            size += stop - start
            if size >= width * _BUFFER_RECORDS:
                bins = first_fit_decreasing([len(ids) for ids, _ in waiting], width)
                done, left = _full_ones(bins, [len(ids) for ids, _ in waiting], width)
                yield from _blocks([[waiting[i] for i in bin] for bin in done], layout)
                waiting = [waiting[i] for i in left]
                size = sum(len(ids) for ids, _ in waiting)
    bins = first_fit_decreasing([len(ids) for ids, _ in waiting], width)
    yield from _blocks([[waiting[i] for i in bin] for bin in bins], layout)


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


def _full_ones(bins: list[list[int]], lengths: Sequence[int], width: int) -> tuple[list[list[int]], list[int]]:
    """Bins to write now, and the samples of the others; all bins if fewer than half are full, so that a run goes on."""
    full = [bin for bin in bins if sum(lengths[i] for i in bin) >= _FULL * width]
    if 2 * len(full) < len(bins):
        return bins, []
    written = {i for bin in full for i in bin}
    return full, [i for i in range(len(lengths)) if i not in written]


def _blocks(records: list[list[_Sample]], layout: Layout) -> Iterator[Block]:
    width = layout.seq_length + 1
    step = max(1, _BLOCK_TOKENS // width)
    for first in range(0, len(records), step):
        part = records[first : first + step]
        shape = (len(part), width)
        block = {
            "input_ids": np.full(shape, layout.pad_id, np.int32),
            "labels": np.full(shape, IGNORED, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
        }
        for row, record in enumerate(part):
            lengths = np.array([len(ids) for ids, _ in record])
            starts = np.cumsum(lengths) - lengths
            used = int(lengths.sum())
            block["input_ids"][row, :used] = np.concatenate([ids for ids, _ in record])
            block["labels"][row, :used] = np.concatenate([labels for _, labels in record])
            block["segment_ids"][row, :used] = np.repeat(np.arange(1, len(record) + 1), lengths)
            block["position_ids"][row, :used] = np.arange(used) - np.repeat(starts, lengths)
        yield block
