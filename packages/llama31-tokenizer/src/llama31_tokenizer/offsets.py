"""Where each token lies in its text: ids and the text in, byte and character ranges out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Spans = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OffsetEncoding:
    """Ids with their places in the text.

    Attributes:
        ids: N tokens.
        byte_spans: (N, 2) start and end in the text's UTF-8 bytes; together they cover it.
        char_spans: (N, 2) start and end in characters; a token of half a character gets the whole one, as in Hugging
            Face's tokenizers.
    """

    ids: list[int]
    byte_spans: Spans
    char_spans: Spans


def locate_tokens(text: str, ids: list[int], tokens: Sequence[bytes], skipped: bytes = b"") -> OffsetEncoding:
    """Places of tokens whose bytes make up a text.

    Args:
        text: what was encoded.
        ids: the tokens.
        tokens: their bytes, in the text's order.
        skipped: bytes of the text that no token stands for.
    """
    data = text.encode("utf-8")
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64) if tokens else np.zeros(0, np.int64)
    kept = np.arange(len(data), dtype=np.int64)
    if skipped and (len(ends) == 0 or ends[-1] != len(data)):
        kept = kept[~np.isin(np.frombuffer(data, np.uint8), np.frombuffer(skipped, np.uint8))]
    # Token n's bytes are kept[starts[n]:ends[n]] of the text.
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    assert len(ends) == 0 or ends[-1] == len(kept), "the tokens do not spell the text"
    byte_spans = np.stack([kept[starts], kept[ends - 1] + 1], axis=1) if len(ends) else np.zeros((0, 2), np.int64)
    leads = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    char_of_byte = np.cumsum(leads, dtype=np.int64) - 1
    char_spans = (
        np.stack([char_of_byte[byte_spans[:, 0]], char_of_byte[byte_spans[:, 1] - 1] + 1], axis=1)
        if len(ends)
        else np.zeros((0, 2), np.int64)
    )
    return OffsetEncoding(ids, byte_spans, char_spans)


def shift_spans(encoding: OffsetEncoding, chars: int, num_bytes: int) -> OffsetEncoding:
    """The same encoding of a text that begins that far into another."""
    return OffsetEncoding(encoding.ids, encoding.byte_spans + num_bytes, encoding.char_spans + chars)


def join_encodings(parts: Sequence[OffsetEncoding]) -> OffsetEncoding:
    """One encoding of several parts of one text."""
    none = np.zeros((0, 2), np.int64)
    return OffsetEncoding(
        [token for part in parts for token in part.ids],
        np.concatenate([none, *(part.byte_spans for part in parts)]),
        np.concatenate([none, *(part.char_spans for part in parts)]),
    )
