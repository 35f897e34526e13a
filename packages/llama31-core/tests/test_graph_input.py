"""The arrays of a forward pass, against a loop over its rows and tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.graph_input import graph_input, wanted_rows

_BLOCK_SIZE = 4


@st.composite
def batches(draw: st.DrawFn) -> ForwardInput:
    lengths = draw(
        st.one_of(st.lists(st.just(1), min_size=1, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=5))
    )
    starts = [draw(st.integers(0, 30)) for _ in lengths]
    tables = [
        draw(st.lists(st.integers(0, 99), min_size=(start + length - 1) // _BLOCK_SIZE + 1, max_size=12))
        for start, length in zip(starts, lengths, strict=True)
    ]
    tokens = [draw(st.lists(st.integers(0, 999), min_size=length, max_size=length)) for length in lengths]
    return ForwardInput(tokens, starts, tables, [draw(st.integers(0, length)) for length in lengths])


@given(batches())
def test_every_token_has_its_position_and_slot(batch: ForwardInput) -> None:
    tokens, positions, slots, tables = graph_input(batch, _BLOCK_SIZE)
    longest = max(map(len, batch.token_ids))
    for array in (tokens, positions, slots, tables):
        assert array.dtype == np.int32
    assert tokens.shape == positions.shape == slots.shape == (len(batch.starts), longest)
    for row, (ids, start, table) in enumerate(zip(batch.token_ids, batch.starts, batch.block_tables, strict=True)):
        for column in range(longest):
            own = min(column, len(ids) - 1)  # the last token again where a row is shorter
            assert tokens[row, column] == ids[own]
            assert positions[row, column] == start + own
            block, offset = divmod(start + own, _BLOCK_SIZE)
            assert slots[row, column] == table[block] * _BLOCK_SIZE + offset
        np.testing.assert_array_equal(tables[row, : len(table)], table)
        assert not tables[row, len(table) :].any()


@given(batches())
def test_the_last_tokens_of_each_row_are_wanted(batch: ForwardInput) -> None:
    longest = max(map(len, batch.token_ids))
    expected = [
        row * longest + column
        for row, (ids, count) in enumerate(zip(batch.token_ids, batch.num_logits, strict=True))
        for column in range(len(ids))
        if column >= len(ids) - count
    ]
    assert wanted_rows(batch).tolist() == (expected or [0])
