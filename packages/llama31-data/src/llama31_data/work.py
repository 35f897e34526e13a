"""The two kinds of work in a run, each a function that any process on any host can do, and the engine's interface.

encode_into   a chunk of raw records -> its file in the spool
build_set     the spool's files of one shard -> one MindRecord set
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from llama31_data.chunks import Chunk, ChunkId
from llama31_data.encode import EncodedChunk, Recipe, encoder_for
from llama31_data.layouts import Block, GiveChunks, Layout, bucket_blocks, concatenated_blocks, padded_blocks, repeated
from llama31_data.manifest import FileEntry, SetEntry, describe_file, write_atomically
from llama31_data.mindrecord_file import INDEX_SUFFIX, write_set
from llama31_data.packing import packed_blocks
from llama31_data.sources import Source
from llama31_data.spool import ChunkReport, Spool

BUILT_SUFFIX = ".built.json"
_BLOCKS: dict[str, Callable[[GiveChunks, Layout], Iterator[Block]]] = {
    "padded": padded_blocks,
    "buckets": bucket_blocks,
    "concatenated": concatenated_blocks,
    "packed": packed_blocks,
}


@dataclass(frozen=True)
class SetTask:
    """One set to build: from which chunks, in order, to which name. Chunks yet to come are gone through but once."""

    spool: Path
    chunks: Iterable[ChunkId]
    layout: Layout
    repeat: int
    path: Path
    num_files: int


@dataclass(frozen=True)
class SetReport:
    """A set that was built."""

    entry: SetEntry
    files: tuple[FileEntry, ...]


class Engine(Protocol):
    """Where the work is done. The order of reports is the order of the work given."""

    def encode(self, sources: list[Source], recipe: Recipe, spool: Path) -> Iterator[ChunkReport]:
        """Encodes every chunk of every source."""
        ...

    def build(self, tasks: list[SetTask]) -> Iterator[SetReport]:
        """Builds every set."""
        ...


def encode_into(spool: Path, recipe: Recipe, chunk: Chunk) -> ChunkReport:
    """Encodes a chunk, unless an earlier run did.

    Raises:
        DataError: the tokenizer cannot be loaded or the spool not written.
    """
    store = Spool(spool)
    return store.find(chunk) or store.save(chunk, encoder_for(recipe).encode(chunk))


def build_set(task: SetTask) -> SetReport:
    """Builds a set, unless an earlier run did.

    Raises:
        DataError: a chunk's file is damaged, or the set cannot be written.
    """
    done = task.path.with_name(f"{task.path.name}{BUILT_SUFFIX}")
    if done.is_file():
        report = _read_report(done)
        if all((task.path.parent / file.name).is_file() for file in report.files):
            return report
    spool = Spool(task.spool)

    def samples() -> Iterable[EncodedChunk]:
        return (spool.load(id) for id in task.chunks)

    blocks = _BLOCKS[task.layout.kind](repeated(samples, task.repeat), task.layout)
    written = write_set(task.path, task.layout.columns, blocks, task.num_files, width=task.layout.seq_length + 1)
    files = [path for data in written.files for path in (data.with_name(data.name + INDEX_SUFFIX), data)]
    widths = {str(width): count for width, count in written.records_by_width.items()}
    entry = SetEntry(task.path.name, tuple(path.name for path in written.files), written.num_records, widths)
    report = SetReport(entry, tuple(describe_file(path) for path in files))
    write_atomically(done, json.dumps(asdict(report)))
    return report


def _read_report(path: Path) -> SetReport:
    data = json.loads(path.read_text(encoding="utf-8"))
    entry = SetEntry(**{**data["entry"], "files": tuple(data["entry"]["files"])})
    return SetReport(entry, tuple(FileEntry(**file) for file in data["files"]))
