"""A process that builds a set behind those that encode: chunk ids in as they are done, the set's report out at the end.

It is the one that loads MindSpore, so the parent stays small and may go on forking workers.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from llama31_data.chunks import ChunkId
from llama31_data.errors import ResumableError
from llama31_data.work import SetReport, SetTask, build_set

_PR_SET_PDEATHSIG = 1


def start_worker(niceness: int = 0) -> None:
    """Ctrl-C is for the parent to handle; a parent that is killed takes its workers along.

    Args:
        niceness: how far it stands back. Those that encode make room for the one that writes: there is but one.
    """
    os.nice(niceness)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before it was watched: no signal will come
        os._exit(1)


class Builder:
    """Use as a context manager: the process runs from its beginning to its end at the latest.

    Args:
        task: the set to build; its chunks are those that `add` names, in that order.
    """

    def __init__(self, task: SetTask, context: multiprocessing.context.BaseContext) -> None:
        self._queue: Any = context.Queue()
        self._result, sender = context.Pipe(duplex=False)
        self._process: Any = context.Process(  # type: ignore[attr-defined]  # every start method has one
            target=_build, args=(task, self._queue, sender), daemon=True
        )

    def __enter__(self) -> Builder:
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._queue.close()
        self._queue.cancel_join_thread()

    def add(self, id: ChunkId) -> None:
        """Names the next chunk; it is in the spool.

        Raises:
            DataError: the set could not be built; no use in going on.
        """
        if self._result.poll() or not self._process.is_alive():
            self.finish()
        self._queue.put(id)

    def finish(self) -> SetReport:
        """Waits for the set.

        Raises:
            DataError: it could not be built.
        """
        self._queue.put(None)
        if self._result not in wait([self._result, self._process.sentinel]) and not self._result.poll():
            raise ResumableError("the process that writes died, perhaps for want of memory; run again to go on")
        result: SetReport | Exception = self._result.recv()
        if isinstance(result, Exception):
            raise result
        return result


def _build(task: SetTask, queue: Any, result: Connection) -> None:
    start_worker()
    try:
        result.send(build_set(replace(task, chunks=iter(queue.get, None))))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        result.send(error)
