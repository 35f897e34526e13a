"""Letters and numbers as tiktoken sees them, for the `regex` library, whose Unicode may be newer or older."""

from __future__ import annotations

import functools

import regex  # type: ignore[import-untyped]
import tiktoken

_STAND_INS = {r"\p{L}": "\u00e9", r"\p{N}": "\u00bd", r"[^\s\p{L}\p{N}]": "\u203b"}


def with_stand_ins(text: str) -> str:
    """The text with characters that `regex` and tiktoken class differently (their Unicode versions differ) replaced.

    Each gives way to a character of the class tiktoken sees, so the pieces have the same lengths.
    """
    table = {ord(char): stand_in for char in set(text) - _ASCII if (stand_in := _stand_in_of(char)) is not None}
    return text.translate(table) if table else text


_ASCII = frozenset(map(chr, range(128)))


@functools.cache
def _probes() -> dict[str, tiktoken.Encoding]:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return {one: tiktoken.Encoding(one, pat_str=one, mergeable_ranks=ranks, special_tokens={}) for one in _STAND_INS}


@functools.cache
def _stand_in_of(char: str) -> str | None:
    for one, probe in _probes().items():
        if probe.encode_ordinary(char):
            return None if regex.match(one, char) else _STAND_INS[one]
    return None
