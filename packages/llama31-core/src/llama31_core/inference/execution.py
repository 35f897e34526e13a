"""One step of the engine: scheduled work in, what it added to each request out; an error ends one request alone.

Over pipeline stages a step begins passes, each with its share of the sequences, until every stage has one, and ends the
oldest: a sequence's next pass begins as soon as its token is drawn, while the other stages compute those of others.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llama31_core.errors import Llama31Error
from llama31_core.inference.batch import BlockMove, PipelinedRunner, Runner
from llama31_core.inference.progress import Group, Progress
from llama31_core.inference.request import StepOutput
from llama31_core.inference.rows import Row, build_input, pack
from llama31_core.inference.scheduler import Chunk, Scheduler
from llama31_core.inference.speculation import Proposer

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Execution:
    """Runs the scheduled work of the requests that have not ended.

    Args:
        runner: computes the passes.
        scheduler: chooses the work.
        proposer: guesses tokens; None for no guesses.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, proposer: Proposer | None) -> None:
        self.groups: dict[str, Group] = {}
        self.progress = Progress(scheduler)
        self.num_failed = 0
        self.num_failed_passes_in_a_row = 0
        self._runner = runner
        self._pipeline = runner if isinstance(runner, PipelinedRunner) and runner.num_stages > 1 else None
        self._num_stages = 1 if self._pipeline is None else self._pipeline.num_stages
        self._passes: deque[list[Row]] = deque()  # begun and not ended, the oldest first
        self._scheduler = scheduler
        self._proposer = proposer

    def add(self, group: Group) -> None:
        """Queue a request."""
        self.groups[group.request.request_id] = group
        self._scheduler.add(group.sequences[0])

    def drop(self, request_id: str) -> bool:
        """Forget a request and all it has; false if there is none of that id."""
        group = self.groups.pop(request_id, None)
        if group is None:
            return False
        for sequence in tuple(group.sequences):
            self.progress.end(group, sequence)
        return True

    def warm_up_moves(self) -> None:
        """Move a block that nobody owns in every way that can come up."""
        blocks, table = self._scheduler.cache.blocks, list[int]()
        blocks.grow(table, 1)
        moves = [BlockMove("clear", table[0], table[0]), BlockMove("copy", table[0], table[0])]
        if self._runner.num_host_blocks:
            moves += [BlockMove("out", table[0], 0), BlockMove("in", 0, table[0])]
        self._runner.move_blocks(moves)
        self._tell_proposer(lambda proposer: proposer.move_blocks(moves))
        blocks.release(table)

    def step(self, now_s: float) -> list[StepOutput]:
        """Compute what the scheduler chooses at this time; over stages, until a pass comes out of the last."""
        outputs = self._begin_passes(now_s)
        while self._passes:
            outputs += self._end(self._passes[0])
            if len(self._passes) < self._num_stages:
                break
        return outputs

    def _begin_passes(self, now_s: float) -> list[StepOutput]:
        """Go on until each stage has a pass, with its share of the sequences, or nothing is left to compute."""
        outputs, begun = list[StepOutput](), True
        while begun and len(self._passes) < self._num_stages:
            chunks = self._scheduler.schedule(now_s)
            outputs += self._move_blocks()
            share = math.ceil(len(self._scheduler.running) / self._num_stages)
            rows = self._with_guesses([chunk for chunk in chunks if chunk.sequence.block_table][:share])
            for group in pack(rows):
                self._begin(group)
            begun = bool(rows)
        return outputs

    def _begin(self, rows: list[Row]) -> None:
        if self._pipeline is not None:
            self._pipeline.begin(build_input(rows))
        for row in rows:
            row.sequence.in_flight = True
        self._passes.append(rows)

    def _end(self, rows: list[Row]) -> list[StepOutput]:
        """What the oldest pass gives."""
        logits_NV = None if self._pipeline is None else self._pipeline.finish()
        self._passes.popleft()
        for row in rows:
            row.sequence.in_flight = False
        return self._compute(rows) if logits_NV is None else self._take(rows, logits_NV)

    def _move_blocks(self) -> list[StepOutput]:
        """Carry out the moves that the schedule needs. If that fails, the requests that needed them end."""
        owned = self._scheduler.cache.take_moves()
        moves = [move for _, move in owned]
        if not moves:
            return []
        try:
            self._runner.move_blocks(moves)
        except Exception as error:  # noqa: BLE001  whatever a device raises ends these requests and no other
            requests = {sequence.request.request_id: sequence.request for sequence, _ in owned if sequence is not None}
            groups = [self.groups.get(name) for name in requests]
            return [output for group in groups if group is not None for output in self._fail(group, error)]
        self._tell_proposer(lambda proposer: proposer.move_blocks(moves))
        return []

    def _with_guesses(self, chunks: list[Chunk]) -> list[Row]:
        """The rows to compute: the chunks, and after those that have room for it what the proposer guesses."""
        wanted = [(chunk.sequence, chunk.max_drafts) for chunk in chunks if chunk.max_drafts]
        guesses = self._tell_proposer(lambda proposer: proposer.propose(wanted)) if wanted else None
        by_sequence = {sequence: guess for (sequence, _), guess in zip(wanted, guesses or [], strict=False)}
        return [Row(chunk.sequence, chunk.num_tokens, by_sequence.get(chunk.sequence, [])) for chunk in chunks]

    def _compute(self, rows: list[Row]) -> list[StepOutput]:
        """Run one pass and draw from what it gives."""
        rows = [row for row in rows if row.sequence.block_table]  # a request that failed in this step is gone
        if not rows:
            return []
        try:
            logits_NV = self._runner.forward(build_input(rows))
        except Exception as error:  # noqa: BLE001  whatever a device raises ends the request at fault and no other
            self.num_failed_passes_in_a_row += 1
            if len(rows) > 1:
                return [output for row in rows for output in self._compute([row])]
            return self._fail(self.groups[rows[0].sequence.request.request_id], error)
        self.num_failed_passes_in_a_row = 0
        return self._take(rows, logits_NV)

    def _take(self, rows: list[Row], logits_NV: npt.NDArray[np.float32]) -> list[StepOutput]:
        """Draw from what a pass gave."""
        prompts = [row for row in rows if not row.sequence.output_ids or row.num_tokens > 1]
        if prompts:
            self._tell_proposer(lambda proposer: proposer.follow(prompts))
        likeliest_N = logits_NV.argmax(-1)
        outputs, end = [], 0
        for row in rows:
            start, end = end, end + row.num_logits
            outputs += self._advance(row, logits_NV[start:end], likeliest_N[start:end])
        return outputs

    def _advance(
        self, row: Row, logits_TV: npt.NDArray[np.float32], likeliest_T: npt.NDArray[np.int64]
    ) -> list[StepOutput]:
        if not row.sequence.block_table:
            return []
        group = self.groups[row.sequence.request.request_id]
        try:
            outputs = self.progress.advance(group, row, logits_TV, likeliest_T)
        except Exception as error:  # noqa: BLE001  a mask is foreign code
            return self._fail(group, error)
        group.open_indexes -= {output.index for output in outputs if output.finish_reason is not None}
        if not group.open_indexes:
            del self.groups[group.request.request_id]
        return outputs

    def _fail(self, group: Group, error: Exception) -> list[StepOutput]:
        """End a request with an error, and clear what it wrote."""
        logger.warning("request %s failed", group.request.request_id, exc_info=error)
        self.num_failed += 1
        del self.groups[group.request.request_id]
        for sequence in tuple(group.sequences):
            self.progress.end(group, sequence, failed=True)
        message = str(error) if isinstance(error, Llama31Error) else f"{type(error).__name__}: {error}"
        name = group.request.request_id
        return [StepOutput(name, [], "error", index=index, error=message) for index in sorted(group.open_indexes)]

    def _tell_proposer(self, tell: Callable[[Proposer], _T]) -> _T | None:
        """Have the proposer do something. Nothing depends on a guess: what fails there costs time alone."""
        if self._proposer is None:
            return None
        try:
            return tell(self._proposer)
        except Exception:
            logger.exception("guessing tokens failed; going on without")
            return None
