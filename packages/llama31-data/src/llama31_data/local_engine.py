"""The engine of one host: work in, reports out in the same order, by this process alone or by a pool of others."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from llama31_data.builder import Builder, start_worker
from llama31_data.chunks import Chunk, ChunkId, iter_chunks
from llama31_data.encode import Recipe, encoder_for
from llama31_data.errors import ResumableError
from llama31_data.sources import Source
from llama31_data.spool import ChunkReport
from llama31_data.work import SetReport, SetTask, build_set, encode_into

_T = TypeVar("_T")
_R = TypeVar("_R")
_ENCODER_NICENESS = 4
_AHEAD = 64  # items under way at least: workers have something to do while MindSpore is loaded to write


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

    def build_behind(self, ids: Iterator[ChunkId], task: SetTask) -> SetReport:
        """Builds the one set of a run while its chunks come from `encode`."""
        if self._workers == 1:
            return build_set(replace(task, chunks=ids))
        with Builder(task, _context()) as builder:
            for id in ids:
                builder.add(id)
            return builder.finish()

    def build(self, tasks: list[SetTask]) -> Iterator[SetReport]:
        """See `Engine.build`."""
        return _in_order(build_set, tasks, min(self._workers, len(tasks)))


def _in_order(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[_R]:
    """`map(work, items)` by several processes, with few items under way at once, so memory does not grow with them."""
    if workers == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=start_worker, initargs=(_ENCODER_NICENESS,))
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > max(_AHEAD, 4 * workers):
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
