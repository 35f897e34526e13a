"""The table of threads in tools/bench/tokenizer.py: `encode_batch` and `count_batch` in two threads against one.

A round goes through a corpus in pieces of 8 MB, and over each piece everything runs in turn: on a machine whose speed
changes from second to second only sums of small pieces compare. The row "all" is one corpus of all documents, shuffled,
as a data job has them. The last column is what the machine gives: two processes that share nothing, each with half of
the piece, against one thread.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.tokenizer_corpora import size_mb
from bench.tokenizer_timing import Corpora, Work, print_table, ratio, time_work

from llama31_tokenizer import Tokenizer

_PIECE_BYTES = 8_000_000


def bench_threads(ours: Tokenizer, raw: Any, corpora: Corpora, rounds: int) -> None:
    """The table, with the least and the greatest gain of a round beside the median."""
    mixed = [document for documents in corpora.values() for document in documents]
    random.Random(0).shuffle(mixed)
    corpora = {**corpora, "all": mixed}
    pieces = {name: list(_cut(documents)) for name, documents in corpora.items()}
    here, there = multiprocessing.Pipe()
    halves = [_halve(piece) for several in pieces.values() for piece in several]
    child = multiprocessing.get_context("fork").Process(target=_serve, args=(ours, halves, there))
    child.start()
    for documents in corpora.values():
        ours.encode_batch(documents, num_threads=2)  # threads start, and build what they keep
    for work in _works(ours, raw, halves[0][0], 0, halves, here).values():
        work()
    rows: list[Sequence[str]] = []
    first = 0
    for name, several in pieces.items():
        works = [_works(ours, raw, piece, first + at, halves, here) for at, piece in enumerate(several)]
        first += len(several)
        t: dict[str, list[float]] = {key: [] for key in works[0]}
        for _ in range(rounds):
            seconds = [{key: time_work(work[key]) for key in t} for work in works]
            for key, several_rounds in t.items():
                several_rounds.append(sum(piece[key] for piece in seconds))
        gains = [one / two for one, two in zip(t["one thread"], t["two threads"], strict=True)]
        rates = (f"{size_mb(corpora[name]) / statistics.median(t[key]):.1f}" for key in t)
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
    ours: Tokenizer, raw: Any, piece: list[str], number: int, halves: list[tuple[list[str], list[str]]], pipe: Any
) -> dict[str, Work]:
    def in_two_processes() -> None:
        pipe.send(number)
        ours.encode_batch(halves[number][0], num_threads=1)
        pipe.recv()

    return {
        "one thread": lambda: ours.encode_batch(piece, num_threads=1),
        "two threads": lambda: ours.encode_batch(piece, num_threads=2),
        "count, one": lambda: ours.count_batch(piece, num_threads=1),
        "count, two": lambda: ours.count_batch(piece, num_threads=2),
        "raw tiktoken, two": lambda: raw.encode_ordinary_batch(piece, num_threads=2),
        "two processes": in_two_processes,
    }


def _serve(ours: Tokenizer, halves: list[tuple[list[str], list[str]]], pipe: Connection) -> None:
    while (number := pipe.recv()) is not None:
        ours.encode_batch(halves[number][1], num_threads=1)
        pipe.send(None)


def _cut(documents: list[str]) -> list[list[str]]:
    pieces: list[list[str]] = [[]]
    size = 0
    for document in documents:
        if size >= _PIECE_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(document)
        size += len(document.encode())
    return pieces


def _halve(piece: list[str]) -> tuple[list[str], list[str]]:
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for document in sorted(piece, key=len, reverse=True):
        lighter = sizes.index(min(sizes))
        halves[lighter].append(document)
        sizes[lighter] += len(document)
    return halves
