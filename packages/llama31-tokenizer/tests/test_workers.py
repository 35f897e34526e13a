"""Threads with tokenizers of their own: the same ids, few of them, and nothing that hangs or stays behind."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama31_tokenizer import Tokenizer, TokenizerError, workers
from llama31_tokenizer.threads import map_groups

TEXTS = [f"text {n}: 1,234 words <|eot_id|> 日本語 e\u0301\n" * 1600 for n in range(12)]
SECONDS = 60


@pytest.fixture
def tokenizer(llama3: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """One without threads so far, whose threads build their own at once."""
    monkeypatch.setattr(workers, "CHARS_PER_OWN", 1)
    return copy.copy(llama3)


@pytest.fixture
def rows(llama3: Tokenizer) -> list[list[int]]:
    return llama3.encode_batch(TEXTS, num_threads=1)


def used_by(tokenizer: Tokenizer, num_threads: int) -> dict[int, Tokenizer]:
    """Thread -> the tokenizer it had, all threads held until each has one."""
    used: dict[int, Tokenizer] = {}
    all_here = threading.Barrier(num_threads)

    def work(own: Tokenizer, group: Sequence[str]) -> list[int]:
        used[threading.get_ident()] = own
        all_here.wait(SECONDS / 2)
        return [0] * len(group)

    map_groups(work, tokenizer, ["x" * (1 << 17)] * num_threads, num_threads)
    return used


def test_each_thread_has_and_keeps_its_own(tokenizer: Tokenizer) -> None:
    first, again = used_by(tokenizer, 3), used_by(tokenizer, 3)
    assert first[threading.get_ident()] is tokenizer
    assert len(set(map(id, first.values()))) == 3
    assert first == again


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_cannot_be_started_are_done_without(
    started: int, tokenizer: Tokenizer, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, count = threading.Thread.start, iter(range(100))

    def start_some(thread: threading.Thread) -> None:
        if next(count) >= started:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    assert tokenizer.encode_batch(TEXTS, num_threads=3) == rows


def test_no_more_of_them_than_allowed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_OWN", 2)
    used = used_by(tokenizer, 6)
    assert len(used) == 6
    assert len({id(own) for own in used.values() if own is not tokenizer}) == 2


def test_small_batches_share_until_they_add_up(llama3: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHARS_PER_OWN", 200_000)
    tokenizer = copy.copy(llama3)
    shared = used_by(tokenizer, 2)  # 262,144 characters for two threads, then twice as many
    assert {id(own) for own in shared.values()} == {id(tokenizer)}
    assert len({id(own) for own in used_by(tokenizer, 2).values()}) == 2


def test_other_engines_share(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "engine", "fastokens")
    assert {id(own) for own in used_by(tokenizer, 2).values()} == {id(tokenizer)}


def test_ids_of_every_call(tokenizer: Tokenizer, rows: list[list[int]]) -> None:
    assert tokenizer.encode_batch(TEXTS, num_threads=3) == rows
    assert tokenizer.count_batch(TEXTS, num_threads=3) == list(map(len, rows))
    special = tokenizer.encode_batch(TEXTS, num_threads=3, allowed_special="all", bos=True, eos=True)
    assert special == [tokenizer.encode(text, allowed_special="all", bos=True, eos=True) for text in TEXTS]


def test_batches_in_several_threads_at_once(tokenizer: Tokenizer, rows: list[list[int]]) -> None:
    with ThreadPoolExecutor(4) as pool:
        batches = [pool.submit(tokenizer.encode_batch, TEXTS, num_threads=3) for _ in range(6)]
        assert all(batch.result(SECONDS) == rows for batch in batches)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_collector_hardly_looks_at_ids(num_threads: int, llama3: Tokenizer) -> None:
    looked_at: list[int] = []

    def look(phase: str, info: dict[str, int]) -> None:
        young = [one for age in range(info["generation"] + 1) for one in gc.get_objects(generation=age)]
        if phase == "start" and info["generation"] < 2:
            looked_at.append(sum(len(one) for one in young if type(one) is list))

    texts = [f"text {n}: 1,234 words of several kinds\n" * 10 for n in range(10_000)]
    gc.collect()
    gc.callbacks.append(look)
    try:
        found = llama3.encode_batch(texts, num_threads=num_threads)
    finally:
        gc.callbacks.remove(look)
    assert 0 < sum(looked_at) < sum(map(len, found)) / 4


def test_a_batch_within_a_batch(tokenizer: Tokenizer, rows: list[list[int]]) -> None:
    def work(own: Tokenizer, group: Sequence[str]) -> list[list[int]]:
        return own.encode_batch([*group, *group], num_threads=2)[: len(group)]

    assert map_groups(work, tokenizer, TEXTS, 3) == rows


def test_an_error_ends_the_others(tokenizer: Tokenizer, rows: list[list[int]]) -> None:
    seen: list[int] = []

    def work(own: Tokenizer, group: Sequence[str]) -> list[int]:
        seen.append(len(group))
        if own is not tokenizer:
            raise TokenizerError("no")
        time.sleep(0.2)
        return [0] * len(group)

    with pytest.raises(TokenizerError, match="no"):
        map_groups(work, tokenizer, ["x" * (1 << 17)] * 40, 2)
    assert len(seen) < 10
    assert tokenizer.encode_batch(TEXTS, num_threads=2) == rows


def _encode_in_child(tokenizer: Tokenizer, send: Callable[[object], None]) -> None:
    send((len(used_by(tokenizer, 2)), tokenizer.encode_batch(TEXTS, num_threads=2)))


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_starts_its_own(busy: bool, tokenizer: Tokenizer, rows: list[list[int]]) -> None:
    tokenizer.encode_batch(TEXTS, num_threads=2)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            tokenizer.encode_batch(TEXTS, num_threads=2)

    thread = threading.Thread(target=keep_busy)
    if busy:
        thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(3):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_encode_in_child, args=(tokenizer, sender.send))
            process.start()
            sender.close()
            try:
                assert receiver.poll(SECONDS), "the forked process hangs"
                assert receiver.recv() == (2, rows)
                process.join(SECONDS)
                assert process.exitcode == 0
            finally:
                process.kill()
    finally:
        stop.set()
        if busy:
            thread.join()
    assert tokenizer.encode_batch(TEXTS, num_threads=2) == rows


def test_pickled_without_threads(tokenizer: Tokenizer, rows: list[list[int]]) -> None:
    tokenizer.encode_batch(TEXTS, num_threads=2)
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(TEXTS, num_threads=2) == rows


def test_threads_end_with_their_tokenizer(tokenizer: Tokenizer) -> None:
    before = set(threading.enumerate())
    doomed = copy.copy(tokenizer)
    doomed.encode_batch(TEXTS, num_threads=3)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del doomed
    gc.collect()
    for thread in started:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_a_program_ends_while_threads_wait(llama3_file: Path) -> None:
    program = (
        "import sys; from llama31_tokenizer import Tokenizer, workers; workers.CHARS_PER_OWN = 1\n"
        "tokenizer = Tokenizer.from_file(sys.argv[1])\n"
        "print(len(tokenizer.encode_batch(['some text ' * 20_000] * 8, num_threads=2)))"
    )
    command = [sys.executable, "-c", program, str(llama3_file)]
    done = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")
