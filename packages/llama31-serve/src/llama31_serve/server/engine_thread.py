"""The only caller of the engine. Jobs and aborts in through a queue, step outputs out to the detokeniser.

The engine is made, warmed up and stepped on this one thread. Aborts that arrive during a step act before the next.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from llama31_serve.server.engine import Engine, EngineStats
from llama31_serve.server.job import NOTHING, Job, StepText

logger = logging.getLogger(__name__)


class EngineFailedError(Exception):
    """The engine raised while it worked on a request."""


@dataclass(frozen=True, slots=True)
class JobOutput:
    """What a step made for one job, or the error that ended it."""

    job: Job
    made: StepText = NOTHING
    failure: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[Engine], Any]
    answer: Future[Any]


@dataclass(frozen=True, slots=True)
class _Abort:
    engine_id: str
    tell: bool


Emit = Callable[[list[JobOutput], float], None]
MAX_FAILED_STEPS = 3
MAX_FAILED_PASSES = 12  # of an engine that survives them: a bad request fails one or two, then others succeed
STATS_PERIOD_S = 0.1
Answer = TypeVar("Answer")


class EngineThread:
    """Runs one engine. `submit`, `abort` and `stop` may be called from any thread.

    Args:
        load: makes the engine, on the thread.
        emit: takes what each step made, and its time (time.monotonic).
        on_broken: called once, on the thread, when so many steps failed in a row that the engine is given up.
    """

    def __init__(self, load: Callable[[], Engine], emit: Emit, on_broken: Callable[[], None]) -> None:
        self._load = load
        self._emit = emit
        self._on_broken = on_broken
        self._commands: queue.SimpleQueue[Job | _Abort | _Call | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._thread = threading.Thread(target=self._run, name="llama31-engine", daemon=True)
        self.ready: Future[Engine] = Future()
        self._consecutive_failures = 0
        self._stats_s = 0.0
        self.stats = EngineStats()
        self.adapters: tuple[str, ...] = ()  # names of those that are loaded

    def start(self) -> None:
        """Begin to load the engine; `ready` resolves to it after the warm-up, or to what went wrong."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand a job to the engine before its next step."""
        self._commands.put(job)

    def abort(self, engine_id: str, *, tell: bool = False) -> None:
        """Forget a job before the next step. With `tell` its last output says "abort", else it has no more outputs."""
        self._commands.put(_Abort(engine_id, tell))

    def call(self, function: Callable[[Engine], Answer]) -> Future[Answer]:
        """Do something with the engine between two steps; the future has what it returned or raised."""
        answer: Future[Answer] = Future()
        self._commands.put(_Call(function, answer))
        return answer

    def stop(self) -> None:
        """End the thread after the step it is in; jobs that are left are aborted."""
        self._commands.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; False if it is still in a step."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def num_jobs(self) -> int:
        """Jobs in the engine now."""
        return len(self._jobs)

    def _run(self) -> None:
        self.ready.set_running_or_notify_cancel()  # from here on nobody who waits for it can cancel it
        try:
            engine = self._load()
            engine.warm_up()
        except BaseException as error:  # noqa: BLE001  whatever it is, whoever waits for `ready` has to hear of it
            self.ready.set_exception(error)
            return
        self.stats = engine.stats()
        self.ready.set_result(engine)
        broken = False
        while self._obey(engine):
            if engine.has_unfinished():
                self._step(engine)
            self._note_stats(engine)
            passes = self.stats.num_failed_passes_in_a_row
            if not broken and (self._consecutive_failures >= MAX_FAILED_STEPS or passes >= MAX_FAILED_PASSES):
                broken = True
                self._on_broken()
        for engine_id in tuple(self._jobs):
            self._forget(engine, engine_id, tell=True)
        engine.close()

    def _obey(self, engine: Engine) -> bool:
        """Carry out every command that waits; while the engine has nothing to do, wait for one. False: stop."""
        wait_s: float | None = engine.gathering_s() if engine.has_unfinished() else None
        while True:
            try:
                command = self._commands.get(block=wait_s != 0, timeout=wait_s or None)
            except queue.Empty:
                return True
            wait_s = 0.0
            if command is None:
                return False
            if isinstance(command, Job):
                self._add(engine, command)
            elif isinstance(command, _Call):
                self._answer(engine, command)
            else:
                self._forget(engine, command.engine_id, tell=command.tell)

    def _note_stats(self, engine: Engine) -> None:
        """Now and then while it works, and always before it rests."""
        now_s = time.monotonic()
        if now_s - self._stats_s >= STATS_PERIOD_S or not engine.has_unfinished():
            self._stats_s = now_s
            self.stats = engine.stats()

    def _add(self, engine: Engine, job: Job) -> None:
        job.started_s = time.monotonic()
        try:
            engine.add(job.engine_id, job.prompt_ids, job.sampling)
        except Exception as error:  # noqa: BLE001  the engine's fault or the request's: this job ends, the thread lives
            self._emit([JobOutput(job, failure=error)], time.monotonic())
            return
        self._jobs[job.engine_id] = job

    def _forget(self, engine: Engine, engine_id: str, *, tell: bool) -> None:
        job = self._jobs.pop(engine_id, None)
        if job is None:
            return
        try:
            engine.abort(engine_id)
        except Exception:
            logger.exception("the engine failed to abort request %s", engine_id)
        if tell:
            self._emit([JobOutput(job, StepText(finish="abort"))], time.monotonic())

    def _step(self, engine: Engine) -> None:
        try:
            outputs = engine.step()
        except Exception as error:
            logger.exception("the engine failed in a step with %d requests", len(self._jobs))
            self._consecutive_failures += 1
            self._fail_all(engine, error)
            return
        self._consecutive_failures = 0
        now_s = time.monotonic()
        made: list[JobOutput] = []
        for output in outputs:
            if output.finish_reason is None:
                job = self._jobs.get(output.request_id)
            else:
                job = self._jobs.pop(output.request_id, None)
            if job is None:
                continue
            if output.finish_reason == "error":
                logger.error("request %s failed in the engine: %s", output.request_id, output.error)
                made.append(JobOutput(job, failure=EngineFailedError("the engine failed on this request")))
            else:
                text = StepText(output.token_ids, output.finish_reason, output.logprobs, output.prompt_logprobs)
                made.append(JobOutput(job, text))
        if made:
            self._emit(made, now_s)

    def _fail_all(self, engine: Engine, error: Exception) -> None:
        """A step is one computation over all running requests: if it fails, none of them can go on."""
        failure = EngineFailedError(f"the engine failed: {type(error).__name__}")
        jobs = tuple(self._jobs.values())
        for job in jobs:
            self._forget(engine, job.engine_id, tell=False)
        self._emit([JobOutput(job, failure=failure) for job in jobs], time.monotonic())

    def _answer(self, engine: Engine, call: _Call) -> None:
        if not call.answer.set_running_or_notify_cancel():
            return
        try:
            answer = call.function(engine)
            self.adapters = tuple(adapter.name for adapter in engine.adapters())  # before the caller can ask for one
        except Exception as error:  # noqa: BLE001  it belongs to whoever asked
            call.answer.set_exception(error)
        else:
            call.answer.set_result(answer)
