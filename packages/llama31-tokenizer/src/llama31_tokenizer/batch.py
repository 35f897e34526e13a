"""Ids of many texts as padded arrays with their attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llama31_tokenizer.errors import TokenizerError

Side = Literal["left", "right"]


@dataclass(frozen=True)
class PaddedBatch:
    """Ids of several texts as one array.

    Attributes:
        input_ids: (B, T) int32.
        attention_mask: (B, T) int32, 1 for a token and 0 for padding.
        num_truncated: rows that lost tokens.
    """

    input_ids: npt.NDArray[np.int32]
    attention_mask: npt.NDArray[np.int32]
    num_truncated: int


def pad_batch(
    batch: Sequence[Sequence[int]],
    *,
    pad_id: int | None,
    length: int | None = None,
    side: Side = "right",
    truncation_side: Side | None = None,
) -> PaddedBatch:
    """Rows of ids as one rectangular array.

    Args:
        batch: ids of each text.
        pad_id: what fills short rows; needed only when rows differ in length.
        length: of every row; None takes the longest.
        side: where the padding goes.
        truncation_side: which end of a row longer than `length` is cut off; None makes such a row an error.

    Raises:
        TokenizerError: a row too long, or padding without a pad id.
    """
    for name, value in (("side", side), ("truncation_side", truncation_side or "right")):
        if value not in ("left", "right"):
            raise TokenizerError(f"{name} is {value!r}, allowed are 'left' and 'right'")
    width = max(map(len, batch), default=0) if length is None else length
    num_truncated = 0
    if any(len(row) < width for row in batch) and pad_id is None:
        raise TokenizerError("rows differ in length and the vocabulary has no pad token; give pad_id")
    ids = np.full((len(batch), width), pad_id or 0, np.int32)
    mask = np.zeros_like(ids)
    for index, row in enumerate(batch):
        if len(row) > width:
            if truncation_side is None:
                raise TokenizerError(
                    f"row {index} has {len(row)} tokens, more than length {width}; raise it or allow truncation"
                )
            row = row[:width] if truncation_side == "right" else row[len(row) - width :]
            num_truncated += 1
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = row
        mask[index, place] = 1
    return PaddedBatch(ids, mask, num_truncated)
