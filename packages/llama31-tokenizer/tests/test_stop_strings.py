"""StopStringMatcher against its definition: cut at the first stop string that is complete."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llama31_tokenizer import StopStringMatcher

letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stop_strings: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(text=letters, stop_strings=stops, include=st.booleans(), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_result_is_the_same_however_the_text_is_cut(
    text: str, stop_strings: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopStringMatcher(stop_strings, include_stop_string=include)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    sent = ""
    for start, end in itertools.pairwise(bounds):
        if matcher.matched is None:
            sent += matcher.push(text[start:end])
    if matcher.matched is None:
        sent += matcher.flush()
    assert (sent, matcher.matched) == expected(text, stop_strings, include)


@given(text=letters, stop_strings=stops)
def test_no_more_is_held_back_than_a_stop_string_could_begin_with(text: str, stop_strings: list[str]) -> None:
    matcher = StopStringMatcher(stop_strings)
    sent = matcher.push(text)
    if matcher.matched is None:
        held = text[len(sent) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stop_strings)
