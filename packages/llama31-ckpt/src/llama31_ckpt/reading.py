"""Reading tensors by rows and one chunk ahead: weights and a list of tensors in, their chunks in order out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.writer import ChunkSource, TensorSpec, row_chunks


def read_rows(weights: Weights, name: str) -> Iterator[Array]:
    """A tensor in chunks of rows."""
    shape = weights.shape(name)
    for start, stop in row_chunks(shape, math.prod(shape[1:]) * 4):
        yield weights.read_slice(name, (slice(start, stop),))


def chunk_source(
    weights: Weights,
    specs: Sequence[TensorSpec],
    parts: Mapping[str, Sequence[str]],
    on_bytes: Callable[[int], object],
) -> ChunkSource:
    """Chunks for a writer that asks for `specs` in their order.

    Args:
        weights: where to read.
        specs: what will be asked for.
        parts: the tensors whose rows make up each spec.
        on_bytes: told the size of each chunk when it has been taken.
    """
    chunks = read_ahead(chunk for spec in specs for part in parts[spec.name] for chunk in read_rows(weights, part))

    def chunks_of(spec: TensorSpec) -> Iterator[Array]:
        left = math.prod(spec.shape)
        while left > 0:
            chunk = next(chunks)
            left -= chunk.size
            yield chunk
            on_bytes(chunk.size * spec.dtype.size_bytes)

    return chunks_of


def read_ahead(chunks: Iterator[Array]) -> Iterator[Array]:
    """Yield `chunks`; while the caller works on one, the next is read. An error surfaces where its chunk would be."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, chunks, None)
        while (chunk := pending.result()) is not None:
            pending = reader.submit(next, chunks, None)
            yield chunk


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(task: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """`task` of every item, `workers` at a time, results in order; after an error no further one is begun."""
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(task, item) for item in items]
        try:
            wait(pending, return_when=FIRST_EXCEPTION)
            return [future.result() for future in pending]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
