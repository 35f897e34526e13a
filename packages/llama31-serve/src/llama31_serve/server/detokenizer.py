"""Detokenises beside the event loop and the engine thread: step outputs in, updates out.

At most one hop to the loop a step: while the loop has not yet taken what it was called for, more is added to that.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from llama31_serve.server.engine_thread import JobOutput
from llama31_serve.server.job import Inbox, Update

logger = logging.getLogger(__name__)

MAX_STEPS_BEHIND = 16  # then the engine waits: a stop string must not be found long after the tokens were made


class Detokenizer:
    """One thread that owns the text state of every job. `push` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, abort: Callable[[str], None]) -> None:
        """`abort` is told the engine id of a job that met a stop string, which the engine can't see."""
        self._loop = loop
        self._abort = abort
        # A SimpleQueue is quicker than a Queue but has no limit: each step takes a ticket, and gives it back.
        self._steps: queue.SimpleQueue[tuple[list[JobOutput], float] | None] = queue.SimpleQueue()
        self._tickets: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(MAX_STEPS_BEHIND):
            self._tickets.put(None)
        self._ready: deque[tuple[Inbox, Update, float]] = deque()
        self._called = False
        self._thread = threading.Thread(target=self._run, name="llama31-detokenizer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def push(self, outputs: list[JobOutput], time_s: float) -> None:
        """Take what one step made at `time_s`; waits if this thread is several steps behind."""
        self._tickets.get()
        self._steps.put((outputs, time_s))

    def stop(self, timeout_s: float) -> bool:
        """End after everything pushed so far; False if that takes too long."""
        self._steps.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            outputs, time_s = step
            for output in outputs:
                update = self._read(output)
                if update is not None:
                    self._ready.append((output.job.inbox, update, time_s))
            self._tickets.put(None)
            if self._ready and not self._called:
                self._called = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody is left to read
                    return

    def _read(self, output: JobOutput) -> Update | None:
        job = output.job
        if job.text.ended:  # tokens the engine made before it heard of the stop string
            return None
        if output.failure is not None:
            return job.text.fail(output.failure)
        try:
            update = job.text.push(output.made)
        except Exception as error:  # a token id the vocabulary does not have ends this job alone
            logger.exception("cannot detokenise request %s", job.engine_id)
            self._abort(job.engine_id)
            return job.text.fail(error)
        if update.finished is not None and output.made.finish is None:
            self._abort(job.engine_id)
        return update

    def _deliver(self) -> None:
        """On the loop."""
        self._called = False  # what is added from here on calls again, whether it is still taken now or not
        for _ in range(len(self._ready)):
            inbox, update, time_s = self._ready.popleft()
            inbox.put(update, time_s)
