"""Texts with very long runs of one kind of character: text in, the pieces around the runs out.

tiktoken's regular expression keeps one entry of a stack for every white-space character of a run and panics at a
million; and one piece of millions of letters is slow there (`long_pieces`). So such runs are looked for first (a run
must cover whole sampling steps, so that looking costs next to nothing), and only the pieces around them are cut here,
with the same expression in the `regex` library, which has no such limit. What lies between goes to tiktoken as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import regex  # type: ignore[import-untyped]

from llama31_tokenizer.long_pieces import STEP_CHARS
from llama31_tokenizer.unicode_classes import with_stand_ins

_CLASSES = (r"\s", r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")
_CLASS_RUN = regex.compile("|".join(f"{one}++" for one in _CLASSES))
# Places where every known pattern ends a piece, whether or not the text goes on there: after letters, after digits,
# after other characters before a space that is no line end. Searched backwards.
_CUT = regex.compile(r"(?r)(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})|(?<=[^\s\p{L}\p{N}])(?=[^\S\r\n])")


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
    model = with_stand_ins(text)
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
