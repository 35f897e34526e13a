"""Texts with very long runs of one kind of character: text in, the pieces around the runs out.

tiktoken's regular expression keeps one entry of a stack for every white-space character of a run and panics at a
million; and one piece of millions of letters is slow there (`long_pieces`). So such runs are looked for first (a run
must cover whole sampling steps, so that looking costs next to nothing), and only the pieces around them are cut here,
with the same expression in the `regex` library, which has no such limit. What lies between goes to tiktoken as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import regex  # type: ignore[import-untyped]
import tiktoken

from llama31_tokenizer.long_pieces import STEP_CHARS

_CLASSES = (r"\s", r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")
_CLASS_RUN = regex.compile("|".join(f"{one}++" for one in _CLASSES))
# Places where every known pattern ends a piece, whether or not the text goes on there: after letters, after digits,
# after other characters before a space that is no line end. Searched backwards.
_CUT = regex.compile(r"(?r)(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})|(?<=[^\s\p{L}\p{N}])(?=[^\S\r\n])")
_STAND_INS = {r"\p{L}": "\u00e9", r"\p{N}": "\u00bd", r"[^\s\p{L}\p{N}]": "\u203b"}


def find_long_run(text: str, begin: int, step: int) -> tuple[int, int] | None:
    """A place inside the first long run from `begin` on, and where the run ends."""
    for at in range(begin, len(text) - step + 1, step):
        if _CLASS_RUN.match(text, at, at + step).end() == at + step:
            return at, _CLASS_RUN.match(text, at).end()
    return None


def encode_around_runs(
    text: str,
    pattern: str,
    encode: Callable[[str], list[int]],
    encode_piece: Callable[[str], list[int]],
    step: int = STEP_CHARS,
) -> list[int]:
    """Ids of a text, its long runs handled apart.

    Args:
        text: any text without lone surrogates.
        pattern: the pre-tokeniser.
        encode: of any text without long runs.
        encode_piece: of one piece of the pattern.
        step: runs of twice as many characters are found for certain.
    """
    run = find_long_run(text, 0, step)
    if run is None:
        return encode(text)
    model = _with_stand_ins(text)
    pieces = regex.compile(pattern)
    ids: list[int] = []
    done = 0
    while run is not None:
        inside, run_end = run
        cut = _CUT.search(model, done, inside)
        start = cut.start() if cut else done
        ids += encode(text[done:start])
        for first, done in _pieces_until(pieces, model, start, run_end):
            ids += encode_piece(text[first:done])
        run = find_long_run(text, done, step)
    return ids + encode(text[done:])


def _pieces_until(pattern: regex.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Pieces from `start` on, up to the first that reaches `end`."""
    for match in pattern.finditer(text, start):
        yield match.span()
        if match.end() >= end:
            return


def _with_stand_ins(text: str) -> str:
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
