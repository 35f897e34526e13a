"""What Ctrl-C, SIGTERM and SIGHUP do to a command: raise where that can be handled, end it at once where it cannot."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
MESSAGE = "llama31-core: interrupted"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def raise_on_signals() -> None:
    """Let the signals that end a process raise KeyboardInterrupt in its main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler)


@contextmanager
def importing_mindspore() -> Iterator[None]:
    """Within the block a signal ends the process at once.

    An exception raised in the middle of MindSpore's import is caught by some of its modules, and leaves others half
    made. Nothing has been written by then that would have to be put in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled_by(_exit, _SIGNALS):
        yield


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> Iterator[None]:
    """Within the block these signals go to `handler`, afterwards to whom they went before. In the main thread alone."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(EXIT_CODE)
