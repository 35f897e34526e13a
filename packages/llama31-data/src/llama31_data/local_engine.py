"""The engine of one host: work in, reports out in the same order, by this process alone or by a pool of others."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

from llama31_data.chunks import Chunk, iter_chunks
from llama31_data.encode import Recipe, encoder_for
from llama31_data.errors import ResumableError
from llama31_data.sources import Source
from llama31_data.spool import ChunkReport
from llama31_data.work import SetReport, SetTask, build_set, encode_into

_T = TypeVar("_T")
_R = TypeVar("_R")
_PR_SET_PDEATHSIG = 1


class LocalEngine:
    """`workers` processes. With one, all is done here."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def encode(self, sources: list[Source], recipe: Recipe, spool: Path) -> Iterator[ChunkReport]:
        """See `Engine.encode`."""
        encoder_for(recipe)  # before the pool forks: its processes share one copy of the vocabulary
        chunks = (chunk for number, source in enumerate(sources) for chunk in iter_chunks(number, source))
        work: Callable[[Chunk], ChunkReport] = partial(encode_into, spool, recipe)
        return _in_order(work, chunks, self._workers)

    def build(self, tasks: list[SetTask]) -> Iterator[SetReport]:
        """See `Engine.build`."""
        return _in_order(build_set, tasks, min(self._workers, len(tasks)))


def _in_order(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[_R]:
    """`map(work, items)` by several processes, with few items under way at once, so memory does not grow with them."""
    if workers == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_start_worker)
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ResumableError(
            "a worker process died, perhaps for want of memory; run again to go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    """fork shares the loaded vocabulary and starts at once, but is not safe beside threads (MindSpore has some)."""
    forks = threading.active_count() == 1 and "mindspore" not in sys.modules
    return multiprocessing.get_context("fork" if forks else "spawn")


def _start_worker() -> None:
    """Ctrl-C is for the parent to handle; a parent that is killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
