"""A model over several ranks as one runner: rank 0 schedules and tells the others what each step computes.

A pipeline stage hears from the one before it, in one order, of passes (plain lists, with its hidden states) and of
blocks to move between them; so it can compute one pass while others compute those before and after. Rank 0 is the hub:
what goes from stage to stage goes through it, in threads beside its own computing, and the last stage's ranks send it
their columns of the logits. So the graphs need nothing but the sums of the tensor-parallel layers, the same on every
device.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama31_core.errors import Llama31Error
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.parallel_channel import Hub, Peer, connect, end_process
from llama31_core.inference.parallel_part import PartRunner, splits_logits
from llama31_core.parallel.agreement import agree, digest_of, digest_of_checkpoint, exchange_texts
from llama31_core.parallel.groups import Groups, world_group
from llama31_core.parallel.launch import find_rank, join_mesh
from llama31_core.parallel.mesh import Coordinates, ParallelConfig


class Part(Protocol):
    """What a rank computes of a pass (a `PartRunner`)."""

    has_columns: bool

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Runner."""

    def forward(
        self, batch: ForwardInput, hidden_BTE: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Hidden states for the next stage, or of the last one logits."""


class LeadingRunner:
    """The runner of rank 0 (a `PipelinedRunner`); what fails on any rank ends all, as the others would wait for ever.

    Args:
        part: what rank 0 computes.
        hub: the other ranks, all of which have come.
        parallel: the mesh.
        plan: of the model.
    """

    def __init__(self, part: Part, hub: Hub, parallel: ParallelConfig, plan: EnginePlan) -> None:
        self.num_blocks = plan.cache.num_blocks
        self.block_size = plan.cache.block_size
        self.num_host_blocks = plan.cache.num_host_blocks
        self.num_stages = parallel.pp
        self._part, self._hub = part, hub
        ranks = [
            [parallel.rank(Coordinates(stage, 0, 0, tp)) for tp in range(parallel.tp)] for stage in range(parallel.pp)
        ]
        beside, *later = [[hub.peers[rank] for rank in stage if rank != 0] for stage in ranks]
        self._beside, self._next = beside, later[0] if later else []
        for stage, following in pairwise(later):
            stage[0].pass_on(following)
        last = later[-1] if later else beside
        self._answering = last if splits_logits(plan.config, parallel) else last[:1] if later else []
        self._begun: deque[npt.NDArray[np.float32]] = deque()  # what rank 0 computed of the passes

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Runner."""
        _tell([*self._beside, *self._next], moves)
        self._part.move_blocks(moves)

    def begin(self, batch: ForwardInput) -> None:
        """See PipelinedRunner."""
        try:
            _tell(self._beside, (batch, None))
            out = self._part.forward(batch)
            _tell(self._next, (batch, out))
        except Exception as error:
            raise _failed(error) from error
        self._begun.append(out)

    def finish(self) -> npt.NDArray[np.float32]:
        """See PipelinedRunner."""
        own = self._begun.popleft()
        try:
            columns = [] if self._next else [own]
            columns += [peer.receive() for peer in self._answering]
        except EOFError as error:
            raise _failed(error) from error
        return np.concatenate(columns, axis=-1) if len(columns) > 1 else columns[0]

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """See Runner; not while a pass is begun."""
        assert not self._begun
        self.begin(batch)
        return self.finish()

    def close(self) -> None:
        """Let the others end, once passes that nobody waits for any more have left the stages."""
        with suppress(SystemExit):
            while self._next and self._begun:
                self.finish()
        self._hub.close()


def _tell(peers: Sequence[Peer], message: Any) -> None:
    for peer in peers:
        peer.send(message)


def _failed(error: Exception) -> SystemExit:
    return SystemExit(f"llama31-core: error: a step over several ranks failed: {error}")


def join(
    plan: EnginePlan,
    parallel: ParallelConfig,
    weights: Path,
    source: str,
    on_lost: Callable[[str], None] = end_process,
) -> LeadingRunner | Follower:
    """Become a rank of a model that a launcher started on as many processes as its mesh has.

    Args:
        plan: of the model.
        parallel: its mesh.
        weights: model directory or weight file.
        source: where the mesh was asked for, for messages.
        on_lost: what rank 0 does, in another thread, when the named rank has ended; no step comes to an end after it.

    Raises:
        ConfigError: no launcher, other ranks than the mesh has, ranks that do not meet or are set to do other things.
    """
    rank = find_rank(parallel, source)
    join_mesh()
    world = world_group(parallel, rank)
    problem = ""
    facts = {"the model": digest_of(plan.config.model_dump_json()), "the layout": digest_of(parallel.model_dump_json())}
    facts["the cache"] = digest_of(repr(plan.cache))
    facts["the checkpoint"] = digest_of_checkpoint(weights, rank)
    agree(world, facts)
    host = os.environ.get("MS_SCHED_HOST", "127.0.0.1")
    hub, key = None, secrets.token_hex(16)
    if rank == 0:
        hub = Hub(host, key.encode())
    port, _, key = exchange_texts(world, f"{hub.port if hub else 0} {key}")[0].partition(" ")
    groups = Groups(parallel, rank, plan.config.n_kv_heads)
    part: PartRunner | None = None
    try:
        part = PartRunner(weights, plan.config, parallel, groups, plan.cache, plan.precision)
    except Llama31Error as error:
        problem = str(error)
    agree(world, {}, problem)
    assert part is not None
    if hub is None:
        return Follower(part, connect(host, int(port), key.encode(), rank), parallel, rank)
    hub.accept(range(1, parallel.world_size), on_lost)
    return LeadingRunner(part, hub, parallel, plan)


class Follower:
    """A rank that does what rank 0, or the stage before it, says."""

    def __init__(self, part: Part, leader: Peer, parallel: ParallelConfig, rank: int) -> None:
        self._part, self._leader = part, leader
        at = parallel.coordinates(rank)
        is_last = at.pp == parallel.pp - 1
        # Hidden states are whole on every rank of a stage: one of them sends them.
        speaks = at.pp > 0 and at.tp == 0
        self._answers = is_last and (part.has_columns or speaks)
        self._tells_next_stage = speaks and not is_last

    def follow(self) -> None:
        """Compute until rank 0 says farewell."""
        while (message := self._leader.receive()) is not None:
            if isinstance(message, list):
                self._part.move_blocks(message)
            else:
                batch, hidden_BTE = message
                out = self._part.forward(batch, hidden_BTE)
                message = batch, out
                if self._answers:
                    self._leader.send(out)
            if self._tells_next_stage:
                self._leader.send(message)
