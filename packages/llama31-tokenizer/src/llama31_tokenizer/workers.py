"""Threads that encode beside the calling one: jobs in, each done in its thread with a tokenizer of that thread's own.

tiktoken's matcher keeps its scratch space in a pool. The thread that used a codec first has a fast way to it; all
others go through locks, at every piece of text: with one codec, two threads are hardly faster than one. So these
threads stay, and each builds a tokenizer of its own once there has been enough text to pay for that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama31_tokenizer.tokenizer import Tokenizer

MAX_OWN = 7  # threads with a tokenizer of their own, 35 MB each; more threads share the first one
CHARS_PER_OWN = (
    4_000_000  # a thread's share of text from which on its own tokenizer, 0.1 s to build, has paid for itself
)

Job = Callable[["Tokenizer"], None]


class Workers:
    """At most `MAX_OWN` threads, started when there is work.

    They end when the tokenizer that holds them is gone and never keep a program from ending. A forked process has none
    of its parent's threads and starts its own.
    """

    def __init__(self) -> None:
        self._pid = 0  # of the process whose threads these are

    def submit(self, job: Job, tokenizer: Tokenizer, num_jobs: int, num_chars: int) -> list[Future[None]]:
        """Have `num_jobs` threads each do the job once, or as many as can be started.

        Args:
            job: called with the tokenizer to use in its thread.
            tokenizer: whose ids.
            num_jobs: how many threads, 1 or more.
            num_chars: of the texts that these jobs and the calling thread share.
        """
        if self._pid != os.getpid():
            self._pool, self._own, self._num_chars = ThreadPoolExecutor(MAX_OWN), threading.local(), 0
            self._pid = os.getpid()
            tokenizer.count("first")  # in the calling thread, before one of these could be the first
        self._num_chars += num_chars
        pays = self._num_chars >= CHARS_PER_OWN * (num_jobs + 1)
        kept = min(num_jobs, MAX_OWN)
        futures: list[Future[None]] = []
        try:
            for _ in range(kept):
                futures.append(self._pool.submit(_do, job, tokenizer, self._own, pays))
            if kept < num_jobs:
                more = ThreadPoolExecutor(num_jobs - kept)
                for _ in range(num_jobs - kept):
                    futures.append(more.submit(job, tokenizer))
                more.shutdown(wait=False)  # once they are done
        except RuntimeError:  # no more threads, or the interpreter ends: there are those that were started, or none
            pass
        return futures


def _do(job: Job, tokenizer: Tokenizer, own: threading.local, pays: bool) -> None:
    if pays and tokenizer.engine == "tiktoken" and tokenizer.vocabulary.pattern and not hasattr(own, "tokenizer"):
        own.tokenizer = type(tokenizer)(tokenizer.vocabulary, tokenizer.engine)
    job(getattr(own, "tokenizer", tokenizer))
