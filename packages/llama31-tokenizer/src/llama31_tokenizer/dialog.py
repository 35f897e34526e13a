"""An encoded dialog: its ids, and which of them an assistant wrote."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

Span = tuple[int, int]


class EncodedDialog:
    """Ids of a dialog.

    Attributes:
        ids: the dialog's tokens.
        assistant_spans: `(start, end)` token ranges that an assistant wrote, the token that ends its turn included;
            for a template they are worked out when first asked for.
    """

    def __init__(self, ids: list[int], find_spans: Callable[[], list[Span]]) -> None:
        self.ids = ids
        self._find_spans = find_spans

    @cached_property
    def assistant_spans(self) -> list[Span]:
        return self._find_spans()

    def __len__(self) -> int:
        return len(self.ids)
