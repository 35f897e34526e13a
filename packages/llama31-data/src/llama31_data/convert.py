"""Alpaca records in, ShareGPT conversations out: the JSON that MindFormers' alpaca_converter writes, byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama31_data.alpaca import conversation
from llama31_data.chunks import Chunk, iter_chunks
from llama31_data.encode import Reject, parse_payload
from llama31_data.errors import DataError, RecordError
from llama31_data.manifest import discard, write_atomically
from llama31_data.schemas import checked_schema
from llama31_data.sources import find_sources

REJECTS_SUFFIX = ".rejects.jsonl"


class ConvertReport(NamedTuple):
    """What a conversion did. `rejects_file` is None when there are none."""

    written: int
    rejects: list[Reject]
    rejects_file: Path | None


def convert_alpaca(
    data_path: str,
    output_path: str,
    *,
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda records: None,
) -> ConvertReport:
    """Converts a file (JSON array, JSON Lines, Parquet; gzip or zstd). Memory does not grow with it.

    A conversation's id is the record's number in the file, from 1. Records that cannot be used are left out and
    listed in `OUTPUT.rejects.jsonl`.

    Raises:
        DataError: unreadable input, existing output without `overwrite`, no usable record, or (strict) one that is not.
    """
    output = Path(output_path)
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists; give --overwrite to replace it, or another --output_path")
    source = find_sources(data_path, plain_text=False)[0]
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    rejects: list[Reject] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            written = 0
            for text in _conversations(iter_chunks(0, source), rejects, progress):
                if strict and rejects:
                    break
                file.write((",\n" if written else "[\n") + text)
                written += 1
            file.write("\n]" if written else "[]")
            file.flush()
            os.fsync(file.fileno())
        if strict and rejects:
            raise DataError(f"{source.path}:{rejects[0].line}: {rejects[0].reason} (--strict)")
        if not written:
            why = f", the first because {source.path}:{rejects[0].line}: {rejects[0].reason}" if rejects else ""
            raise DataError(f"{source.path}: none of {len(rejects)} records can be used{why}")
        part.replace(output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        discard(part)
    return ConvertReport(written, rejects, _write_rejects(output, source.path.name, rejects))


def _conversations(chunks: Iterator[Chunk], rejects: list[Reject], progress: Callable[[int], object]) -> Iterator[str]:
    number = 0
    for chunk in chunks:
        for line, payload in zip(chunk.lines, chunk.payloads, strict=True):
            number += 1
            try:
                record = parse_payload(payload)
                checked_schema(record, "alpaca")
                text = json.dumps(conversation(record, number), ensure_ascii=False, indent=2)
                text.encode()
            except RecordError as error:
                rejects.append(Reject(line, str(error)))
                continue
            except UnicodeEncodeError:
                rejects.append(Reject(line, "text has an unpaired surrogate, which is not a character"))
                continue
            yield "\n".join("  " + part for part in text.split("\n"))
        progress(len(chunk.lines))


def _write_rejects(output: Path, source_name: str, rejects: list[Reject]) -> Path | None:
    path = output.with_name(output.name + REJECTS_SUFFIX)
    path.unlink(missing_ok=True)
    if not rejects:
        return None
    lines = (
        json.dumps({"file": source_name, "line": line, "reason": reason}, ensure_ascii=False)
        for line, reason in rejects
    )
    write_atomically(path, "".join(line + "\n" for line in lines))
    return path
