"""Many texts at once: work shared among threads, ids of each text out."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.han_text import is_mostly_han
from llama31_tokenizer.spans import spans_of_size

if TYPE_CHECKING:
    from llama31_tokenizer.joined_ids import JoinedIds
    from llama31_tokenizer.tokenizer import Tokenizer

Result = TypeVar("Result")
# Characters of a thread's share of work: long against the cost of handing it over, short against the whole.
_LEAST_GROUP, _MOST_GROUP, _GROUPS_PER_THREAD = 1 << 15, 1 << 16, 8


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], num_threads: int | None) -> list[list[int]]:
    """Ids of each plain text.

    The lists are made at once and filled later. Python's collector looks at every item of a list that is new to it, and
    again some lists later, under its global lock: a third of the time that ids and lists of them take. Lists that were
    there before their ids are no longer new when they get them.

    Filling them needs that lock. While the calling thread has Chinese texts, whose steps need it too (`share_groups`),
    the other threads leave their ids for later.

    Args:
        tokenizer: whose ids.
        texts: the texts.
        num_threads: as in `share_groups`.

    Raises:
        TokenizerError: as `check_texts` and `share_groups` do.
    """
    check_texts(texts)
    rows: list[list[int]] = [[] for _ in texts]
    encoded: deque[tuple[JoinedIds, list[list[int]]]] = deque()  # ids, and the lists they are for
    caller, caller_has_chinese = threading.get_ident(), True

    def encode_group(own: Tokenizer, indexes: Sequence[int]) -> None:
        nonlocal caller_has_chinese
        group = [texts[index] for index in indexes]
        encoded.append((own.encode_joined(group), [rows[index] for index in indexes]))
        is_chinese = is_mostly_han(group[0], 8)
        if threading.get_ident() == caller:
            caller_has_chinese = is_chinese
        if is_chinese:
            fill(1)
        elif not caller_has_chinese:
            fill(2)

    def fill(num_groups: int) -> None:
        for _ in range(num_groups):
            try:
                ids, lists = encoded.pop()
            except IndexError:  # there are no more, another thread may have taken the last
                return
            ids.fill(lists, tokenizer.vocab_size)

    share_groups(encode_group, tokenizer, texts, num_threads)
    fill(len(encoded))
    return rows


def count_texts(tokenizer: Tokenizer, texts: Sequence[str], num_threads: int | None) -> list[int]:
    """Numbers of tokens of plain texts."""

    def count_group(own: Tokenizer, group: Sequence[str]) -> list[int]:
        lengths: list[int] = own.encode_joined(group).lengths.tolist()
        return lengths

    return map_groups(count_group, tokenizer, texts, num_threads)


def map_groups(
    work: Callable[[Tokenizer, Sequence[str]], list[Result]],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    num_threads: int | None,
) -> list[Result]:
    """Results of `work(tokenizer, texts)`, one for each text, of groups as in `share_groups`."""
    check_texts(texts)
    results: list[Result | None] = [None] * len(texts)

    def work_on(own: Tokenizer, indexes: Sequence[int]) -> None:
        for index, result in zip(indexes, work(own, [texts[index] for index in indexes]), strict=True):
            results[index] = result

    share_groups(work_on, tokenizer, texts, num_threads)
    return cast("list[Result]", results)


def share_groups(
    work: Callable[[Tokenizer, Sequence[int]], None],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    num_threads: int | None,
) -> None:
    """`work(tokenizer, indexes)`, done for a group of texts at a time in `num_threads` threads.

    tiktoken works without Python's global lock, so threads do run at the same time. The calling thread is one of them;
    it begins with Chinese texts, whose steps are held up by that lock (`han_encoder`), and the other threads end with
    them.

    Args:
        work: is handed a tokenizer, another than `tokenizer` in another thread, and which of the texts to work on.
        tokenizer: whose ids.
        texts: the texts.
        num_threads: how many threads; None: as many as the process has cores.

    Raises:
        TokenizerError: a wrong number of threads, or what `work` raises; an error ends the other threads' work too.
    """
    threads = len(os.sched_getaffinity(0)) if num_threads is None else num_threads
    if not isinstance(threads, int) or threads < 1:
        raise TokenizerError(f"num_threads is {threads!r}, expected a whole number of 1 or more")
    num_chars = sum(map(len, texts))
    share = num_chars // (threads * _GROUPS_PER_THREAD)
    groups = deque(_group(texts, min(max(share, _LEAST_GROUP), _MOST_GROUP)))

    def drain(own: Tokenizer, take: Callable[[], list[int]]) -> None:
        try:
            while indexes := _take_group(take):
                work(own, indexes)
        except BaseException:
            groups.clear()  # the other threads find nothing more to do
            raise

    others = min(threads, len(groups)) - 1
    job = partial(drain, take=groups.popleft)
    futures = tokenizer.workers.submit(job, tokenizer, others, num_chars) if others > 0 else []
    try:
        drain(tokenizer, groups.pop)
    finally:
        running = [future for future in futures if not future.cancel()]
        wait(running)
    for future in running:
        future.result()


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what would be taken for texts or fail in a thread.

    Raises:
        TokenizerError: one string, what has no first and second text, or something in the list that is no string.
    """
    if isinstance(texts, str):
        raise TokenizerError("texts is one string, expected a list of strings; use encode for one text")
    if not isinstance(texts, Sequence) and (isinstance(texts, Mapping) or not hasattr(texts, "__getitem__")):
        raise TokenizerError(f"texts is {type(texts).__name__}, expected a list of strings; make a list of it")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TokenizerError(f"texts[{index}] is {type(text).__name__}, expected a string")


def _take_group(take: Callable[[], list[int]]) -> list[int]:
    try:
        return take()
    except IndexError:  # another thread took the last one
        return []


def _group(texts: Sequence[str], num_chars: int) -> Iterator[list[int]]:
    """Indexes of texts that have `num_chars` characters or more together; those of mostly Chinese ones are the last."""
    kinds: tuple[list[int], list[int]] = ([], [])
    for index, text in enumerate(texts):
        kinds[is_mostly_han(text, 8)].append(index)
    for indexes in kinds:
        for span in spans_of_size([texts[index] for index in indexes], num_chars):
            yield indexes[span]
