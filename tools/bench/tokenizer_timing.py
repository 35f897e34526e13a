"""How tools/bench/tokenizer times one thread and prints: work in, seconds without waits for a core out.

Giving the result back is not timed; the garbage collector runs as Python starts it.
"""

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
Corpora = dict[str, list[str]]
Seconds = dict[str, list[float]]  # of each work, in each round


def queued_seconds() -> float:
    """How long the calling thread has been ready to run without a core."""
    statistics_file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return int(statistics_file.read_text().split()[1]) / 1e9 if statistics_file.exists() else 0.0


def time_work(work: Work) -> float:
    """Seconds of one call, without waits for a core."""
    queued, start = queued_seconds(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start - (queued_seconds() - queued)
    del result
    return seconds


def run_rounds(works: dict[str, Work], rounds: int) -> Seconds:
    """Seconds of each work in each round."""
    seconds: Seconds = {name: [] for name in works}
    for number in range(rounds):
        names = list(works)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(time_work(works[name]))
    return seconds


def measure(corpora: Corpora, works: Callable[[list[str]], dict[str, Work]], rounds: int) -> dict[str, Seconds]:
    """Seconds of each work over each corpus, and over all of them as the sum of each round."""
    found = {name: run_rounds(works(documents), rounds) for name, documents in corpora.items()}
    of_works = {key: [found[name][key] for name in corpora] for key in next(iter(found.values()))}
    return {**found, "all": {key: list(map(sum, zip(*rows, strict=True))) for key, rows in of_works.items()}}


def print_rates(title: str, corpora: Corpora, found: dict[str, Seconds], gains: Sequence[tuple[str, str]]) -> None:
    """A table of MB/s; `gains` are the columns of ratios, as pairs of what is faster and what it is compared with."""
    size = {name: sum(len(document.encode()) for document in documents) / 1e6 for name, documents in corpora.items()}
    size["all"] = sum(size.values())
    works = list(next(iter(found.values())))
    header = ("corpus", "MB", *works, *(f"{ours} to {reference}" for ours, reference in gains))
    rows = [
        (
            name,
            f"{size[name]:.1f}",
            *(f"{size[name] / statistics.median(seconds[work]):.1f}" for work in works),
            *(ratio(seconds[reference], seconds[ours]) for ours, reference in gains),
        )
        for name, seconds in found.items()
    ]
    print_table(title, header, rows)


def ratio(reference: list[float], ours: list[float]) -> str:
    """How many times faster ours is: the median over rounds."""
    return f"{statistics.median(a / b for a, b in zip(reference, ours, strict=True)):.2f}x"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()
