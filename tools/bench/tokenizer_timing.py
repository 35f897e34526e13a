"""How tools/bench/tokenizer times one thread and prints: work in, seconds without waits for a core out."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

for variable, value in (("TOKENIZERS_PARALLELISM", "false"), ("RAYON_NUM_THREADS", "1")):
    os.environ[variable] = value  # read by the libraries at their first call
Work = Callable[[], object]


def queued_seconds() -> float:
    """How long the calling thread has been ready to run without a core."""
    statistics_file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return int(statistics_file.read_text().split()[1]) / 1e9 if statistics_file.exists() else 0.0


def time_work(work: Work) -> float:
    """Seconds of one call, without waits for a core."""
    queued, start = queued_seconds(), time.perf_counter()
    work()
    return time.perf_counter() - start - (queued_seconds() - queued)


def ratio(reference: list[float], ours: list[float]) -> str:
    """How many times faster ours is: the median over rounds."""
    return f"{statistics.median(a / b for a, b in zip(reference, ours, strict=True)):.2f}x"


def print_table(title: str, header: Sequence[str], rows: list[Sequence[str]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()
