"""Many texts at once: work shared among threads, ids of each text out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.id_lists import to_list

if TYPE_CHECKING:
    from llama31_tokenizer.tokenizer import Tokenizer

Result = TypeVar("Result")
# Characters of a thread's share of work: long against the cost of handing it over, short against the whole.
_LEAST_GROUP, _MOST_GROUP, _GROUPS_PER_THREAD = 1 << 16, 1 << 18, 8


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], num_threads: int | None) -> list[list[int]]:
    """Ids of each plain text.

    Args:
        tokenizer: whose ids.
        texts: the texts.
        num_threads: as in `map_groups`.
    """

    def encode_group(own: Tokenizer, group: Sequence[str]) -> list[list[int]]:
        ids, lengths = own.encode_many_to_numpy(group)
        joined, ends = to_list(ids, own.vocab_size), np.cumsum(lengths).tolist()
        return [joined[start:end] for start, end in pairwise([0, *ends])]

    return map_groups(encode_group, tokenizer, texts, num_threads)


def count_texts(tokenizer: Tokenizer, texts: Sequence[str], num_threads: int | None) -> list[int]:
    """Numbers of tokens of plain texts."""
    return map_groups(_count_group, tokenizer, texts, num_threads)


def _count_group(own: Tokenizer, group: Sequence[str]) -> list[int]:
    lengths: list[int] = own.encode_many_to_numpy(group)[1].tolist()
    return lengths


def map_groups(
    work: Callable[[Tokenizer, Sequence[str]], list[Result]],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    num_threads: int | None,
) -> list[Result]:
    """`work(tokenizer, texts)`, done for a group of texts at a time in `num_threads` threads.

    tiktoken works without Python's global lock, so threads do run at the same time. The calling thread is one of them.

    Args:
        work: a result for each text, with the tokenizer it is handed: another than `tokenizer` in another thread.
        tokenizer: whose ids.
        texts: the texts.
        num_threads: how many threads; None: as many as the process has cores.

    Raises:
        TokenizerError: wrong arguments, or what `work` raises; an error ends the other threads' work too.
    """
    if isinstance(texts, str):
        raise TokenizerError("texts is one string, expected a list of strings; use encode for one text")
    threads = len(os.sched_getaffinity(0)) if num_threads is None else num_threads
    if threads < 1:
        raise TokenizerError(f"num_threads is {threads}, expected 1 or more")
    num_chars = sum(map(len, texts))
    share = num_chars // (threads * _GROUPS_PER_THREAD)
    groups = [texts[span.start : span.stop] for span in _group(texts, min(max(share, _LEAST_GROUP), _MOST_GROUP))]
    done: list[list[Result]] = [[] for _ in groups]
    pending = iter(range(len(groups)))

    def drain(own: Tokenizer) -> None:
        try:
            for index in pending:
                done[index] = work(own, groups[index])
        except BaseException:
            deque(pending, maxlen=0)  # the other threads find nothing more to do
            raise

    others = min(threads, len(groups)) - 1
    futures = tokenizer.workers.submit(drain, tokenizer, others, num_chars) if others > 0 else []
    try:
        drain(tokenizer)
    finally:
        running = [future for future in futures if not future.cancel()]
        wait(running)
    for future in running:
        future.result()
    return [result for group in done for result in group]


def _group(texts: Sequence[str], num_chars: int) -> Iterator[range]:
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= num_chars:
            yield range(start, index + 1)
            start, size = index + 1, 0
    if start < len(texts):
        yield range(start, len(texts))
