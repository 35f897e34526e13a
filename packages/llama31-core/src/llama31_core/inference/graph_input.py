"""What a forward pass is, as arrays for a graph of dynamic shapes: lists of different length in, rectangles out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama31_core.inference.batch import ForwardInput

_Ints = npt.NDArray[np.int32]


def graph_input(batch: ForwardInput, block_size: int) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """Tokens, positions and slots (B, T), block tables (B, M).

    A shorter row ends in repetitions of its last token, which write once more what that one wrote.
    """
    if max(map(len, batch.token_ids)) == 1:
        return _one_token_each(batch, block_size)
    lengths_B1 = np.array([[len(tokens)] for tokens in batch.token_ids], np.int32)
    columns_BT = np.minimum(np.arange(lengths_B1.max(), dtype=np.int32), lengths_B1 - 1)
    tokens_BT = np.take_along_axis(_rectangle(batch.token_ids), columns_BT, axis=1)
    positions_BT = np.array(batch.starts, np.int32)[:, None] + columns_BT
    # A table's tail beyond its own blocks points at block 0; the mask on positions hides it.
    tables_BM = _rectangle(batch.block_tables)
    slots_BT = np.take_along_axis(tables_BM, positions_BT // block_size, axis=1) * block_size
    slots_BT += positions_BT % block_size
    return tokens_BT, positions_BT, slots_BT, tables_BM


def _one_token_each(batch: ForwardInput, block_size: int) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """The same without NumPy's cost of a dozen calls, a thirtieth of the step of a small model."""
    places = zip(batch.starts, batch.block_tables, strict=True)
    slots = [table[start // block_size] * block_size + start % block_size for start, table in places]
    columns = np.array([[tokens[0] for tokens in batch.token_ids], batch.starts, slots], np.int32)[:, :, None]
    return columns[0], columns[1], columns[2], _rectangle(batch.block_tables)


def _rectangle(rows: list[list[int]]) -> _Ints:
    """Rows of different length, filled up with zeros."""
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def wanted_rows(batch: ForwardInput) -> _Ints:
    """Which of the B * T tokens logits are wanted of: at least one, for the graph's sake."""
    longest = max(map(len, batch.token_ids))
    spans = enumerate(zip(batch.token_ids, batch.num_logits, strict=True))
    ends = ((index * longest + len(tokens), count) for index, (tokens, count) in spans)
    return np.array([row for end, count in ends for row in range(end - count, end)] or [0], np.int32)
