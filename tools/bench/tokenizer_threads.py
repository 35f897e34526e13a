"""The table of threads in tools/bench/tokenizer.py: `encode_batch` and `count_batch` in two threads against one.

In a round everything runs in turn over a corpus; ratios are the medians of the rounds'. The row "all" is one corpus of
all documents, shuffled, as a data job has them. The last column is what the machine gives: two processes that share
nothing, each with half of the corpus, against one thread.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from bench.tokenizer_corpora import size_mb
from bench.tokenizer_timing import Corpora, Work, print_table, ratio, run_rounds, time_work

from llama31_tokenizer import Tokenizer


def bench_threads(ours: Tokenizer, raw: Any, corpora: Corpora, rounds: int) -> None:
    """The table, with the least and the greatest gain of a round beside the median."""
    mixed = [document for documents in corpora.values() for document in documents]
    random.Random(0).shuffle(mixed)
    corpora = {**corpora, "all": mixed}
    here, there = multiprocessing.Pipe()
    halves = [_halve(documents) for documents in corpora.values()]
    child = multiprocessing.get_context("fork").Process(target=_serve, args=(ours, halves, there))
    child.start()
    for documents in corpora.values():
        ours.encode_batch(documents, num_threads=2)  # threads start, and build what they keep
    rows: list[Sequence[str]] = []
    for number, (name, documents) in enumerate(corpora.items()):
        works = _works(ours, raw, documents, number, halves, here)
        t = run_rounds(works, rounds)
        gains = [one / two for one, two in zip(t["one thread"], t["two threads"], strict=True)]
        rates = (f"{size_mb(documents) / statistics.median(t[key]):.1f}" for key in works)
        ratios = (ratio(t["one thread"], t["two threads"]), f"{min(gains):.2f} to {max(gains):.2f}")
        counting = ratio(t["count, one"], t["count, two"])
        more = (ratio(t["raw tiktoken, two"], t["two threads"]), ratio(t["one thread"], t["two processes"]))
        rows.append((name, *rates, *ratios, counting, *more))
    here.send(None)
    child.join()
    columns = ("one thread", "two threads", "count, one", "count, two", "raw tiktoken, two", "two processes")
    gained = ("two threads to one", "its range", "counting", "to raw tiktoken", "two processes to one thread")
    print_table("Threads, MB/s", ("corpus", *columns, *gained), rows)


def _works(
    ours: Tokenizer, raw: Any, documents: list[str], number: int, halves: list[tuple[list[str], list[str]]], pipe: Any
) -> dict[str, Work]:
    def in_two_processes() -> list[list[int]]:
        pipe.send(number)
        rows = ours.encode_batch(halves[number][0], num_threads=1)
        pipe.recv()
        return rows

    return {
        "one thread": lambda: ours.encode_batch(documents, num_threads=1),
        "two threads": lambda: ours.encode_batch(documents, num_threads=2),
        "count, one": lambda: ours.count_batch(documents, num_threads=1),
        "count, two": lambda: ours.count_batch(documents, num_threads=2),
        "raw tiktoken, two": lambda: raw.encode_ordinary_batch(documents, num_threads=2),
        "two processes": in_two_processes,
    }


def _serve(ours: Tokenizer, halves: list[tuple[list[str], list[str]]], pipe: Connection) -> None:
    while (number := pipe.recv()) is not None:
        time_work(partial(ours.encode_batch, halves[number][1], num_threads=1))
        pipe.send(None)


def _halve(documents: list[str]) -> tuple[list[str], list[str]]:
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for document in sorted(documents, key=len, reverse=True):
        lighter = sizes.index(min(sizes))
        halves[lighter].append(document)
        sizes[lighter] += len(document)
    return halves
