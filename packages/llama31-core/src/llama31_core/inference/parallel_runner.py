"""A model over several ranks as one runner: rank 0 schedules and tells the others what each step computes.

Rank 0 is the hub: a step's plain lists go from it to the ranks of a stage, hidden states between stages go through it,
and the last stage's ranks send it their columns of the logits. So that the graphs need nothing but the sums of the
tensor-parallel layers, the same on every device.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class LeadingRunner:
    """The runner of rank 0 (a `Runner`); what fails on any rank ends all, as the others would wait for ever."""

    def __init__(self, part: PartRunner, hub: Hub, parallel: ParallelConfig, plan: EnginePlan) -> None:
        self.num_blocks = plan.cache.num_blocks
        self.block_size = plan.cache.block_size
        self.num_host_blocks = plan.cache.num_host_blocks
        self._part, self._hub = part, hub
        self._stages = [
            [parallel.rank(Coordinates(stage, 0, 0, tp)) for tp in range(parallel.tp)] for stage in range(parallel.pp)
        ]
        self._has_columns = splits_logits(plan.config, parallel)

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Runner."""
        for peer in self._hub.peers.values():
            peer.send(moves)
        self._part.move_blocks(moves)

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """See Runner."""
        try:
            first, *later = self._stages
            self._tell(first[1:], (batch, None))
            out = [self._part.forward(batch)]
            if later:
                for ranks in later:
                    self._tell(ranks, (batch, out[0]))
                    out = [self._hub.peers[ranks[0]].receive()]
            senders = self._stages[-1][1:] if self._has_columns else []
            columns = [out[0], *(self._hub.peers[rank].receive() for rank in senders)]
        except Exception as error:
            raise SystemExit(f"llama31-core: error: a step over several ranks failed: {error}") from error
        return np.concatenate(columns, axis=-1) if len(columns) > 1 else columns[0]

    def close(self) -> None:
        """Let the others end."""
        self._hub.close()

    def _tell(self, ranks: list[int], message: Any) -> None:
        for rank in ranks:
            self._hub.peers[rank].send(message)


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
    """A rank that does what rank 0 says."""

    def __init__(self, part: PartRunner, leader: Peer, parallel: ParallelConfig, rank: int) -> None:
        self._part, self._leader = part, leader
        at = parallel.coordinates(rank)
        is_last = at.pp == parallel.pp - 1
        # Hidden states are whole on every rank of a stage: one of them sends them.
        self._answers = (is_last and part.has_columns) or (at.pp > 0 and at.tp == 0)

    def follow(self) -> None:
        """Compute until rank 0 says farewell."""
        while (message := self._leader.receive()) is not None:
            if isinstance(message, list):
                self._part.move_blocks(message)
                continue
            out = self._part.forward(*message)
            if self._answers:
                self._leader.send(out)
