"""What a step asks of a runner: plain numbers and lists, so that one process can schedule and send them to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class BlockMove:
    """One block of the cache to move before anything is computed.

    `copy`: device block to device block. `out`: device block `source` to host block `target`; `in`: the other way.
    `clear`: fill device block `target` with zeros.
    """

    kind: Literal["copy", "out", "in", "clear"]
    source: int
    target: int


@dataclass(frozen=True)
class ForwardInput:
    """One forward pass over B sequences.

    Attributes:
        token_ids: the new tokens of each sequence; they may differ in number.
        starts: the position of the first of them.
        block_tables: the blocks that hold each sequence, new tokens included.
        num_logits: of how many of the last new tokens logits are wanted; 0 for a chunk in the middle of a prompt.
        adapter_slots: where each sequence's adapter is, 0 for the base model alone; empty if all have that.
    """

    token_ids: list[list[int]]
    starts: list[int]
    block_tables: list[list[int]]
    num_logits: list[int]
    adapter_slots: Sequence[int] = ()


class Runner(Protocol):
    """Computes batches. The engine's tests use one whose logits can be worked out by hand."""

    num_blocks: int
    block_size: int
    num_host_blocks: int

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """Carry out these moves, one after the other in effect."""

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """Store keys and values of the new tokens and give the wanted logits (sum of num_logits, V), row after row.

        May be called again with the same input after it failed.
        """


@runtime_checkable
class PipelinedRunner(Runner, Protocol):
    """A runner whose stages compute different passes at once. Passes and moves go through each stage in the order in
    which they were begun."""

    num_stages: int

    def begin(self, batch: ForwardInput) -> None:
        """Hand a pass to the first stage."""

    def finish(self) -> npt.NDArray[np.float32]:
        """The logits, as of `forward`, of the pass that was begun first of those that have not been finished."""
