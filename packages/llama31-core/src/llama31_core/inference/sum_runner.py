"""A runner whose logits can be worked out by hand: for tests of the engine and of what is built on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llama31_core.inference.batch import BlockMove, ForwardInput


class SumRunner:
    """Says that the next token is the sum of all tokens so far, each times its position + 1, modulo the vocabulary.

    It keeps tokens in a paged cache as a real runner keeps keys, so a wrong block, position, order or move changes the
    sum; and it refuses a batch that writes to a block of another row.

    Args:
        vocab_size: tokens.
        num_blocks, block_size, num_host_blocks: of the cache.
        spread: size of the pattern that is added to the logits, so that sampling has something to choose from.
    """

    def __init__(
        self,
        vocab_size: int,
        num_blocks: int = 8,
        block_size: int = 4,
        num_host_blocks: int = 0,
        spread: float = 0.0,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.spread = spread
        self.cache = np.full((num_blocks, block_size), -1)
        self.host = np.full((num_host_blocks, block_size), -1)
        self.num_calls = 0
        self.num_rows = 0

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Runner."""
        for move in moves:
            if move.kind == "clear":
                self.cache[move.target] = 0
            else:
                source = self.host if move.kind == "in" else self.cache
                target = self.host if move.kind == "out" else self.cache
                target[move.target] = source[move.source]

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """See Runner."""
        self.num_calls += 1
        self.num_rows += len(batch.starts)
        for row, (start, table) in enumerate(zip(batch.starts, batch.block_tables, strict=True)):
            written = set(table[start // self.block_size :])
            others = {block for other, taken in enumerate(batch.block_tables) if other != row for block in taken}
            assert not written & others, "a block that is written has two owners"
        logits = []
        rows = zip(batch.token_ids, batch.starts, batch.block_tables, batch.num_logits, strict=True)
        for tokens, start, table, num_logits in rows:
            for position, token in enumerate(tokens, start):
                self.cache[table[position // self.block_size], position % self.block_size] = token
            said = self.cache[table].reshape(-1)
            end = start + len(tokens)
            logits += [self.logits(said[: position + 1].tolist()) for position in range(end - num_logits, end)]
        return np.array(logits, np.float32).reshape(-1, self.vocab_size)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What comes after these tokens."""
        following = self.next_token(tokens)
        logits: npt.NDArray[np.float32] = np.cos(np.arange(self.vocab_size) * (following + 1.0)).astype(np.float32)
        logits *= self.spread
        logits[following] += 1
        return logits

    def next_token(self, tokens: Sequence[int]) -> int:
        """The likeliest token after these, without spread."""
        return sum(token * (position + 1) for position, token in enumerate(tokens)) % self.vocab_size


class PipelinedSumRunner(SumRunner):
    """The same over stages: what is begun reaches the cache when the last stage comes to it, passes later.

    Args:
        num_stages: of the pipeline.
        sizes: vocab_size, num_blocks, block_size, num_host_blocks, as of `SumRunner`.
        spread: the same.

    Attributes:
        num_begun: for every pass that was finished, how many were begun then, itself included.
    """

    def __init__(self, num_stages: int, *sizes: int, spread: float = 0.0) -> None:
        super().__init__(*sizes)
        self.spread = spread
        self.num_stages = num_stages
        self.num_begun: list[int] = []
        self._begun: deque[ForwardInput | list[BlockMove]] = deque()

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Runner."""
        self._begun.append(moves)

    def begin(self, batch: ForwardInput) -> None:
        """See PipelinedRunner."""
        self._begun.append(batch)

    def finish(self) -> npt.NDArray[np.float32]:
        """See PipelinedRunner."""
        self.num_begun.append(sum(isinstance(one, ForwardInput) for one in self._begun))
        while isinstance(one := self._begun.popleft(), list):
            super().move_blocks(one)
        return super().forward(one)

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """See Runner."""
        raise AssertionError("passes go through the stages")
