"""The unit of work: an input file in, chunks of at most 1,024 raw records out, each with its place and its digest.

Chunk boundaries depend on the file alone, never on the number of workers or on what an earlier run did: this is why
the output of a run is the same however it was spread, killed and resumed.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama31_data.errors import DataError
from llama31_data.json_stream import iter_array
from llama31_data.sources import Source, open_binary, open_text

MAX_RECORDS = 1024
MAX_BYTES = 1 << 20


class ChunkId(NamedTuple):
    """Place of a chunk: the file's number among the run's sources, and the chunk's number in the file."""

    source: int
    chunk: int


@dataclass(frozen=True)
class Chunk:
    """Raw records. A payload is JSON still to be parsed (bytes), a parsed value, or a paragraph of text (str)."""

    id: ChunkId
    digest: str
    lines: list[int]
    payloads: list[Any]


class _Raw(NamedTuple):
    line: int
    payload: Any
    identity: bytes  # what the digest takes in


def iter_chunks(source_number: int, source: Source) -> Iterator[Chunk]:
    """The file's chunks in order; memory does not grow with the file.

    Raises:
        DataError: the file cannot be read, unpacked, or (a JSON array) parsed.
    """
    readers = {"array": _array, "lines": _lines, "parquet": _parquet, "text": _paragraphs}
    return _grouped(source_number, readers[source.format](source))


def _grouped(source_number: int, records: Iterable[_Raw]) -> Iterator[Chunk]:
    held: list[_Raw] = []
    number, size_bytes = 0, 0
    for record in records:
        held.append(record)
        size_bytes += len(record[2])
        if len(held) == MAX_RECORDS or size_bytes >= MAX_BYTES:
            yield _chunk(ChunkId(source_number, number), held)
            number, size_bytes, held = number + 1, 0, []
    if held:
        yield _chunk(ChunkId(source_number, number), held)


def _chunk(id: ChunkId, records: list[_Raw]) -> Chunk:
    lines, payloads, identities = zip(*records, strict=True)
    return Chunk(id, hashlib.sha256(b"\n".join(identities)).hexdigest(), list(lines), list(payloads))


def _array(source: Source) -> Iterator[_Raw]:
    with open_text(source) as stream:
        for line, text, value in iter_array(stream, str(source.path)):
            yield _Raw(line, value, text.encode("utf-8", "surrogatepass"))


def _lines(source: Source) -> Iterator[_Raw]:
    with open_binary(source) as stream:
        for number, line in enumerate(stream, start=1):
            stripped = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if stripped:
                yield _Raw(number, stripped, stripped)


def _paragraphs(source: Source) -> Iterator[_Raw]:
    """Runs of lines between blank ones."""
    first, held = 0, ""
    with open_text(source) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                first, held = (first, held + line) if held else (number, line)
            elif held:
                yield _Raw(first, held, held.encode())
                held = ""
    if held:
        yield _Raw(first, held, held.encode())


def _parquet(source: Source) -> Iterator[_Raw]:
    """Rows; their number (from 1) stands for the line."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{source.path}: needs pyarrow: pip install 'llama31-data[parquet]'") from error
    number = 0
    try:
        with ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=MAX_RECORDS):
                for row in batch.to_pylist():
                    number += 1
                    payload = {key: value for key, value in row.items() if value is not None}
                    yield _Raw(number, payload, json.dumps(payload, default=str).encode())
    except (ArrowException, OSError) as error:
        raise DataError(f"{source.path}: is not a Parquet file, or is damaged: {error}") from error
