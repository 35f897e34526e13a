"""Finds stop strings in text that arrives in pieces. The result does not depend on how the text was cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Passes text on, holding back what may turn out to be the beginning of a stop string.

    The stop string that is complete first wins; of two complete at the same character, the longer one.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop_string: bool = False) -> None:
        self._stops = sorted(set(stop_strings), key=len, reverse=True)
        self._first_characters = {stop[0] for stop in self._stops}
        self._include = include_stop_string
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to send; after a match, the last of it. Nothing may be pushed after a match."""
        assert self.matched is None
        if not self._stops:
            return text
        held = self._held + text
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return held[: end if self._include else end - len(self.matched)]
        keep = self._prefix_length(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back and, at the end of the text, is no stop string."""
        held, self._held = self._held, ""
        return held

    def _prefix_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), len(self._stops[0]) - 1)
        for length in range(longest, 0, -1):
            if text[-length] in self._first_characters:
                tail = text[-length:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return length
        return 0
