"""From scheduled chunks to forward passes: rows of different length in, a few rectangles with little padding out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.sequence import Sequence
from llama31_core.lora.table import BASE_SLOT

# Padding costs arithmetic, another pass costs reading all weights again. Below so many tokens reading them is what
# takes the time; above, padding may add this share.
_SMALL_PASS_TOKENS = 32
_MAX_PADDED = 1.25


@dataclass(frozen=True)
class Row:
    """What one sequence computes in a pass: its next `num_tokens` known tokens and, after them, guessed ones."""

    sequence: Sequence
    num_tokens: int
    drafts: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens in the pass."""
        return self.num_tokens + len(self.drafts)

    @property
    def completes(self) -> bool:
        """Whether the next token can be drawn from it."""
        return self.num_tokens == self.sequence.num_uncached

    @property
    def num_logits(self) -> int:
        """Of how many of its last tokens the logits are looked at."""
        if self.sequence.wants_prompt_logprobs:
            return self.num_tokens
        return 1 + len(self.drafts) if self.completes else 0


def pack(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups of rows to compute in one pass each, the shortest first."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length):
        group = [*groups[-1], row] if groups else []
        area = len(group) * row.length
        if group and area <= max(_SMALL_PASS_TOKENS, _MAX_PADDED * sum(other.length for other in group)):
            groups[-1] = group
        else:
            groups.append([row])
    return groups


def build_input(rows: list[Row]) -> ForwardInput:
    """One pass over these rows."""
    sequences = [row.sequence for row in rows]
    return ForwardInput(
        [
            row.sequence.token_ids(row.sequence.num_cached, row.sequence.num_cached + row.num_tokens) + row.drafts
            for row in rows
        ],
        [sequence.num_cached for sequence in sequences],
        [list(sequence.block_table) for sequence in sequences],
        [row.num_logits for row in rows],
        [BASE_SLOT if s.request.adapter is None else s.request.adapter.slot for s in sequences],
    )
