"""Guesses of a smaller model that shares the block tables of the large one: its cache has a block for each of those."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from llama31_core.errors import ConfigError
from llama31_core.inference.batch import BlockMove, ForwardInput, Runner
from llama31_core.inference.rows import Row, build_input
from llama31_core.inference.sequence import Sequence

# What it has not seen is computed in one pass, if it is not more than this; what lies further back it does without.
_MAX_MISSED_TOKENS = 64


class DraftModelProposer:
    """Draws guesses from a draft model, with the random numbers that the tokens themselves will be drawn with.

    Args:
        runner: the draft model's, with as many blocks of the same size as the large model's.
        target: the large model's runner.

    Raises:
        ConfigError: the two caches differ.
    """

    def __init__(self, runner: Runner, target: Runner) -> None:
        mine, theirs = ((r.num_blocks, r.block_size, r.num_host_blocks) for r in (runner, target))
        if mine != theirs:
            raise ConfigError(
                f"the draft model's cache is {mine} (num_blocks, block_size, num_host_blocks), the model's {theirs}; "
                f"build both with the same sizes"
            )
        self._runner = runner
        self._num_seen: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def propose(self, rows: list[tuple[Sequence, int]]) -> list[list[int]]:
        """See Proposer: one pass of the draft model for each token of the longest guess."""
        guesses: list[list[int]] = [[] for _ in rows]
        for ahead in range(max(limit for _, limit in rows)):
            active = [index for index, (_, limit) in enumerate(rows) if limit > ahead]
            missed = [self._missed(rows[index][0], guesses[index]) for index in active]
            starts = [rows[i][0].num_tokens + ahead - len(tokens) for i, tokens in zip(active, missed, strict=True)]
            tables = [list(rows[index][0].block_table) for index in active]
            logits_BV = self._runner.forward(ForwardInput(missed, starts, tables, [1] * len(active)))
            for index, logits_V in zip(active, logits_BV, strict=True):
                sequence, guess = rows[index][0], guesses[index]
                said = sequence.output_ids + guess
                guess.append(sequence.sampler.guess(logits_V, sequence.request.prompt_ids, said, ahead))
                self._num_seen[sequence] = sequence.num_tokens + ahead
        return guesses

    def follow(self, rows: list[Row]) -> None:
        """See Proposer: the draft model reads the prompt too."""
        batch = build_input(rows)
        self._runner.forward(ForwardInput(batch.token_ids, batch.starts, batch.block_tables, [0] * len(rows)))

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Proposer."""
        self._runner.move_blocks(moves)

    def _missed(self, sequence: Sequence, guess: list[int]) -> list[int]:
        """The tokens up to the last guess that the draft model has not seen."""
        if guess:
            return guess[-1:]
        # A guess that was wrong has been seen too, but `num_cached` does not count it.
        seen = min(self._num_seen.get(sequence, sequence.num_cached), sequence.num_cached)
        return sequence.token_ids(max(seen, sequence.num_tokens - _MAX_MISSED_TOKENS), sequence.num_tokens)
