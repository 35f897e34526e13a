"""Samples to records: nothing lost, nothing doubled, labels beside their tokens, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llama31_data.encode import EncodedChunk
from llama31_data.layouts import (
    Block,
    GiveChunks,
    Layout,
    bucket_blocks,
    concatenated_blocks,
    default_buckets,
    padded_blocks,
    repeated,
)
from llama31_data.packing import first_fit_decreasing, packed_blocks

PAD = -1
SEQ = 16
lengths_of_chunks = st.lists(st.lists(st.integers(1, SEQ + 1), min_size=1, max_size=40), min_size=1, max_size=4)


def chunks_of(lengths: Iterable[list[int]]) -> list[EncodedChunk]:
    """Chunks whose tokens are 0, 1, 2, …, so that each is known by its value; odd ones are trained on."""
    chunks, first = [], 0
    for chunk in lengths:
        tokens = np.arange(first, first + sum(chunk), dtype=np.int32)
        first += sum(chunk)
        chunks.append(EncodedChunk(tokens, tokens % 2 == 1, np.array(chunk, np.int32)))
    return chunks


def samples_of(lengths: Iterable[list[int]]) -> tuple[GiveChunks, list[list[int]]]:
    chunks = chunks_of(lengths)
    expected = [part.tolist() for chunk in chunks for part in np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1])]
    return lambda: chunks, expected


def rows(blocks: Iterator[Block]) -> list[dict[str, NDArray[np.int32]]]:
    return [dict(zip(block, row, strict=True)) for block in blocks for row in zip(*block.values(), strict=True)]


def check_labels(row: dict[str, NDArray[np.int32]]) -> None:
    ids, labels = row["input_ids"], row["labels"]
    assert (labels == np.where((ids != PAD) & (ids % 2 == 1), ids, -100)).all()


@given(lengths_of_chunks)
def test_padded_is_one_sample_a_record_in_order(lengths: list[list[int]]) -> None:
    samples, expected = samples_of(lengths)
    found = rows(padded_blocks(samples, Layout("padded", SEQ, PAD)))
    assert [row["input_ids"][row["input_ids"] != PAD].tolist() for row in found] == expected
    for row, sample in zip(found, expected, strict=True):
        assert row["input_ids"][: len(sample)].tolist() == sample, "padding is at the end"
        assert len(row["input_ids"]) == SEQ + 1
        check_labels(row)


@given(lengths_of_chunks)
def test_buckets_take_the_shortest_width_that_fits_and_come_in_order(lengths: list[list[int]]) -> None:
    samples, expected = samples_of(lengths)
    found = rows(bucket_blocks(samples, Layout("buckets", SEQ, PAD, (4, 8, 16))))
    assert sorted(row["input_ids"][row["input_ids"] != PAD].tolist() for row in found) == sorted(expected)
    widths = [len(row["input_ids"]) for row in found]
    assert widths == sorted(widths)
    for row in found:
        used = int((row["input_ids"] != PAD).sum())
        assert len(row["input_ids"]) == next(width for width in (5, 9, 17) if width >= used)
        check_labels(row)


@given(lengths_of_chunks)
def test_packed_keeps_every_sample_whole_with_its_own_segment_and_positions(lengths: list[list[int]]) -> None:
    samples, expected = samples_of(lengths)
    found = rows(packed_blocks(samples, Layout("packed", SEQ, PAD)))
    seen = []
    for row in found:
        ids, segments, positions = row["input_ids"], row["segment_ids"], row["position_ids"]
        assert ids.shape == segments.shape == positions.shape == (SEQ + 1,)
        assert ((segments == 0) == (ids == PAD)).all()
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert (np.diff(here) == 1).all()
            assert positions[here].tolist() == list(range(len(here)))
            seen.append(ids[here].tolist())
        check_labels(row)
    assert sorted(seen) == sorted(expected)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120))
def test_first_fit_decreasing_is_what_its_name_says(lengths: list[int], capacity: int) -> None:
    """Against the definition, one item at a time."""
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for bin in expected:
            if sum(lengths[i] for i in bin) + lengths[index] <= capacity:
                bin.append(index)
                break
        else:
            expected.append([index])
    assert first_fit_decreasing(lengths, capacity) == expected


def test_packing_fills_records_and_holds_a_bounded_number_of_samples() -> None:
    """A million tokens of instruction-like lengths: at least 99.8% full, and chunks are asked for only as needed."""
    lengths = np.random.default_rng(0).gamma(3.0, 25.0, 16_000).astype(int).clip(8, 1025)
    chunks = chunks_of(lengths.reshape(-1, 1000).tolist())
    taken = 0

    def samples() -> Iterator[EncodedChunk]:
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    blocks = packed_blocks(samples, Layout("packed", 1024, PAD))
    first = next(blocks)
    assert taken < len(chunks) / 2
    records = len(first["input_ids"]) + sum(len(block["input_ids"]) for block in blocks)
    assert lengths.sum() / (records * 1025) > 0.998


@given(lengths_of_chunks)
def test_concatenated_is_the_stream_cut_evenly(lengths: list[list[int]]) -> None:
    samples, expected = samples_of(lengths)
    stream = [token for sample in expected for token in sample]
    found = rows(concatenated_blocks(samples, Layout("concatenated", SEQ, PAD)))
    assert [token for row in found for token in row["input_ids"].tolist()] == stream[: len(found) * (SEQ + 1)]
    assert len(stream) - len(found) * (SEQ + 1) < SEQ + 1
    assert all((row["labels"] == row["input_ids"]).all() for row in found)


@pytest.mark.parametrize("blocks_of", [padded_blocks, packed_blocks, concatenated_blocks])
def test_large_inputs_come_in_blocks_of_bounded_size(
    blocks_of: Callable[[GiveChunks, Layout], Iterator[Block]],
) -> None:
    samples, _ = samples_of([[1000] * 500] * 6)
    sizes = [block["input_ids"].size for block in blocks_of(samples, Layout("x", 999, PAD))]
    assert sum(sizes) == 3_000_000
    assert max(sizes) <= 1_600_000


def test_repeat_goes_through_the_samples_again() -> None:
    samples, expected = samples_of([[3, 4], [5]])
    found = rows(padded_blocks(repeated(samples, 3), Layout("padded", SEQ, PAD)))
    assert [row["input_ids"][row["input_ids"] != PAD].tolist() for row in found] == expected * 3


def test_default_buckets_end_with_the_sequence_length() -> None:
    assert default_buckets(8192) == (128, 256, 512, 1024, 2048, 4096, 8192)
    assert default_buckets(1000) == (128, 256, 512, 1000)
    assert default_buckets(64) == (64,)
