"""Guessing tokens ahead, so that one pass can check several: what has been said so far in, likely next tokens out.

A guess never changes a completion: the engine draws every token from the model's own logits, and a guess only decides
for how many positions these are computed at once (Leviathan et al. 2023). The draws are those of `Sampler`, whose
random number for a position is the same whether it was guessed or not, so completions are equal token for token with
and without guesses, and not just in distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Protocol
from weakref import WeakKeyDictionary

from llama31_core.inference.batch import BlockMove
from llama31_core.inference.rows import Row
from llama31_core.inference.sequence import Sequence


class Proposer(Protocol):
    """Guesses tokens."""

    def propose(self, rows: list[tuple[Sequence, int]]) -> list[list[int]]:
        """For each sequence at most so many tokens that may follow it; its blocks have room for them."""

    def follow(self, rows: list[Row]) -> None:
        """Hear of tokens of prompts that are now in the cache."""

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """Hear of blocks that have been moved."""


class NgramProposer:
    """Prompt lookup: what followed the last time that the sequence said the same few tokens (Saxena 2023).

    Args:
        max_ngram: tokens that must agree; fewer are tried if so many are not found.
        min_ngram: the fewest that are tried.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._indexes: WeakKeyDictionary[Sequence, _NgramIndex] = WeakKeyDictionary()

    def propose(self, rows: list[tuple[Sequence, int]]) -> list[list[int]]:
        """See Proposer."""
        return [self._continue(sequence, limit) for sequence, limit in rows]

    def follow(self, rows: list[Row]) -> None:
        """See Proposer; nothing to keep."""

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Proposer; nothing to keep."""

    def _continue(self, sequence: Sequence, limit: int) -> list[int]:
        index = self._indexes.setdefault(sequence, _NgramIndex(self._sizes))
        index.extend(sequence.token_ids(index.num_tokens, sequence.num_tokens))
        return index.following(limit)


class _NgramIndex:
    """Where each short run of tokens of one sequence was last followed by something."""

    def __init__(self, sizes: Ids[int]) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            for size in self._sizes:
                if size <= len(self._tokens):
                    self._after[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def following(self, limit: int) -> list[int]:
        for size in self._sizes:
            start = self._after.get(tuple(self._tokens[-size:]))
            if start is not None and size <= len(self._tokens):
                return self._tokens[start : start + limit]
        return []
