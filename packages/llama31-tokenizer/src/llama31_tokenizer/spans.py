"""Texts that follow each other, cut into parts of a size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def spans_of_size(texts: Sequence[str], num_chars: int) -> Iterator[slice]:
    """Which texts have `num_chars` characters or more together, part by part; the last part may have fewer."""
    start = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= num_chars or end == len(texts):
            yield slice(start, end)
            start, size = end, 0
