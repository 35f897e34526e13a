"""Samples of any length in, equally long MindRecord records out, in blocks of rows: padded, in length buckets, or
concatenated. (Packed: packing.py.)

A record of seq_length N has N + 1 tokens: MindFormers' trainers, and ours, shift inputs and targets by one themselves.
`labels[i]` is `input_ids[i]` where the model is trained on token i, else -100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama31_data.encode import EncodedChunk

IGNORED = -100
_BLOCK_TOKENS = 1 << 20

Block = dict[str, NDArray[np.int32]]
"""Column name -> (records, record length)."""

GiveChunks = Callable[[], Iterable[EncodedChunk]]
"""Gives the run's chunks from the first one, each time it is called."""


@dataclass(frozen=True)
class Layout:
    """How samples become records.

    Attributes:
        kind: "padded", "buckets", "concatenated" or "packed".
        buckets: ascending record lengths less one; the last is seq_length. Only for "buckets".
    """

    kind: str
    seq_length: int
    pad_id: int
    buckets: tuple[int, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the int32 columns."""
        packed = ("segment_ids", "position_ids") if self.kind == "packed" else ()
        return ("input_ids", "labels", *packed)


def default_buckets(seq_length: int) -> tuple[int, ...]:
    """128, 256, 512, … and seq_length: padding is under half of any record longer than 128."""
    lengths = [128]
    while lengths[-1] * 2 < seq_length:
        lengths.append(lengths[-1] * 2)
    return (*(length for length in lengths if length < seq_length), seq_length)


def padded_blocks(samples: GiveChunks, layout: Layout) -> Iterator[Block]:
    """One record a sample, filled up with `pad_id`."""
    for chunk in samples():
        yield from _padded(chunk, np.arange(len(chunk.lengths)), layout.seq_length + 1, layout.pad_id)


def bucket_blocks(samples: GiveChunks, layout: Layout) -> Iterator[Block]:
    """One record a sample, filled up to the shortest bucket that holds it; all of a bucket before the next one."""
    shorter = 0
    for bucket in layout.buckets:
        for chunk in samples():
            here = np.flatnonzero((chunk.lengths > shorter) & (chunk.lengths <= bucket + 1))
            yield from _padded(chunk, here, bucket + 1, layout.pad_id)
        shorter = bucket + 1


def _padded(chunk: EncodedChunk, rows: NDArray[np.intp], width: int, pad_id: int) -> Iterator[Block]:
    starts = np.cumsum(chunk.lengths) - chunk.lengths
    labels = np.where(chunk.trained, chunk.tokens, np.int32(IGNORED))
    step = max(1, _BLOCK_TOKENS // width)
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        lengths = chunk.lengths[block]
        held = np.arange(width) < lengths[:, None]  # (records, width)
        sources = np.repeat(starts[block] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        ids = np.full(held.shape, pad_id, np.int32)
        targets = np.full(held.shape, IGNORED, np.int32)
        ids[held] = chunk.tokens[sources]
        targets[held] = labels[sources]
        yield {"input_ids": ids, "labels": targets}


def concatenated_blocks(samples: GiveChunks, layout: Layout) -> Iterator[Block]:
    """All samples as one stream, cut every seq_length + 1 tokens, all trained on; what is left over is dropped."""
    width = layout.seq_length + 1
    held: list[NDArray[np.int32]] = []
    size = 0
    for chunk in samples():
        held.append(chunk.tokens)
        size += len(chunk.tokens)
        if size >= max(width, _BLOCK_TOKENS):
            stream = np.concatenate(held)
            whole = size // width * width
            yield _stream_block(stream[:whole], width)
            held, size = [stream[whole:]], size - whole
    if size >= width:
        yield _stream_block(np.concatenate(held)[: size // width * width], width)


def _stream_block(stream: NDArray[np.int32], width: int) -> Block:
    rows = stream.reshape(-1, width)
    return {"input_ids": rows, "labels": rows}


def repeated(samples: GiveChunks, times: int) -> GiveChunks:
    """`samples`, `times` times over."""

    def chunks() -> Iterator[EncodedChunk]:
        for _ in range(times):
            yield from samples()

    return chunks
