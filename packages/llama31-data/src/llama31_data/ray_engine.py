"""The engine of a cluster: the local engine's work, spread by Ray Data. Hosts share the file system of the output.

Every source is a read task that streams the chunks it cuts, and encoding is a map over them: sources are read where the
work is, and the driver sees reports alone. Sets are then built by a map over the shards.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llama31_data.chunks import MAX_BYTES, iter_chunks
from llama31_data.encode import Recipe
from llama31_data.errors import DataError
from llama31_data.sources import Source
from llama31_data.spool import ChunkReport
from llama31_data.work import SetReport, SetTask, build_set, encode_into

try:
    import pyarrow
    import ray
    import ray.data
    from ray.data.block import BlockMetadata
except ImportError as error:
    raise DataError(f"--engine ray: needs Ray Data: pip install 'llama31-data[ray]' ({error})") from error

_R = TypeVar("_R")
_READER_CPUS = 0.01  # not the encoders' figure: Ray would make one task of reading and encoding, and so one a source


class RayEngine:
    """Work on the cluster that RAY_ADDRESS names, or on this host; at most `workers` tasks at a time."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            ray.init(log_to_driver=False, **here)

    def encode(self, sources: list[Source], recipe: Recipe, spool: Path) -> Iterator[ChunkReport]:
        """See `Engine.encode`. Reports come when all are there, since chunks are done in any order."""
        with _small_blocks():
            chunks = ray.data.read_datasource(
                _ChunkSource(sources), num_cpus=_READER_CPUS, override_num_blocks=len(sources)
            )
            reports: Iterator[ChunkReport] = self._map(chunks, lambda chunk: encode_into(spool, recipe, chunk))
            yield from sorted(reports, key=lambda report: report.id)

    def build(self, tasks: list[SetTask]) -> Iterator[SetReport]:
        """See `Engine.build`."""
        with _small_blocks():
            rows = [{"item": pickle.dumps(task)} for task in tasks]
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
            reports: Iterator[SetReport] = self._map(dataset, build_set)
            yield from sorted(reports, key=lambda report: report.entry.name)

    def _map(self, dataset: Any, work: Callable[[Any], _R]) -> Iterator[_R]:
        def on_row(row: dict[str, Any]) -> dict[str, Any]:
            return {"item": pickle.dumps(work(pickle.loads(row["item"])))}

        try:
            for row in dataset.map(on_row, num_cpus=1, concurrency=self._workers).iter_rows():
                yield pickle.loads(row["item"])
        except ray.exceptions.RayError as error:
            raise _data_error(error) from error


class _ChunkSource(ray.data.Datasource):  # type: ignore[misc]  # Ray has no type information
    """Rows with one pickled chunk each; a read task for every source."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__()
        self._sources = sources

    def estimate_inmemory_data_size(self) -> int:
        return sum(source.path.stat().st_size for source in self._sources)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
        return [ray.data.ReadTask(_Read(number, source), metadata) for number, source in enumerate(self._sources)]


class _Read:
    def __init__(self, number: int, source: Source) -> None:
        self._number = number
        self._source = source

    def __call__(self) -> Iterator[Any]:
        for chunk in iter_chunks(self._number, self._source):
            yield pyarrow.table({"item": [pickle.dumps(chunk)]})


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Blocks of about one chunk, so that the next task starts with the first of them; no bars beside ours."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = MAX_BYTES, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


def _data_error(error: BaseException) -> DataError:
    """Our own error that a task raised, out of Ray's wrappings, or one that says what Ray said."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DataError) and not isinstance(seen, ray.exceptions.RayError):  # Ray's can be both
            return type(seen)(str(seen).splitlines()[0])  # without the advice that Ray adds
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return DataError(f"--engine ray: {str(error).strip().splitlines()[-1]}")
