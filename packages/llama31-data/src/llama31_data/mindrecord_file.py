"""Blocks of records in, a MindRecord set of one or more files out.

What MindSpore's FileWriter writes to one file depends on the records, their order and the base name of the file, not on
time, directory or process (checked in tests): so equal blocks give equal bytes. It writes in place, therefore callers
give it a directory of their own and move the files when all are complete.

With several files FileWriter deals the last few records out at random. Here each file has a writer of its own, records
are dealt out in turn, and the headers are then made those of a set (`_link`): the bytes FileWriter writes when the
number of records is a multiple of the number of files (checked in tests, too).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama31_data.errors import DataError, ResumableError
from llama31_data.layouts import Block

INDEX_SUFFIX = ".db"
_DESCRIPTION = "llama31"
_SIZE_BYTES = 8
_PAGE_BYTES = 4 << 20  # FileWriter's default is 32 MiB, and half as slow again; a record has to fit a page
_LARGE_PAGE_BYTES = 64 << 20


class Written(NamedTuple):
    """A finished set: its data files (each with its `.db` index beside it) and what is in them."""

    files: tuple[Path, ...]
    num_records: int
    records_by_width: dict[int, int]


def set_files(path: Path, num_files: int) -> tuple[Path, ...]:
    """The data files of a set, named as FileWriter names them: X, or X0 … X9, X00 … X10."""
    if num_files == 1:
        return (path,)
    digits = len(str(num_files - 1))
    return tuple(path.with_name(f"{path.name}{number:0{digits}d}") for number in range(num_files))


def check_name(path: Path) -> None:
    """Refuses a file name that MindRecord does not take.

    Raises:
        DataError: naming the characters.
    """
    bad = sorted(set(path.name) & set("\\/:*?\"<>|`&';"))
    if bad or path.name != path.name.strip():
        shown = " ".join(bad) or "white space at its ends"
        raise DataError(f"--output_file {path}: MindRecord does not take a file name with {shown}; choose another name")


def write_set(
    path: Path, columns: Sequence[str], blocks: Iterable[Block], num_files: int = 1, *, width: int
) -> Written:
    """Writes a MindRecord set. Files that are there are replaced.

    Args:
        path: of the set; with several files each gets its number behind this name.
        columns: int32 columns that every block has.
        num_files: among how many files the records are dealt out in turn.
        width: of the longest record, in tokens.

    Raises:
        DataError: MindSpore is missing, or could not write, for instance for want of disk space.
    """
    try:
        from mindspore.mindrecord import FileWriter
    except ImportError as error:
        raise ResumableError(
            f"{path}: MindRecord is written with MindSpore ({error}); install it, run again"
        ) from error

    files = set_files(path, num_files)
    for file in files:
        file.unlink(missing_ok=True)
        Path(f"{file}{INDEX_SUFFIX}").unlink(missing_ok=True)
    num_records = 0
    records_by_width: dict[int, int] = {}
    schema = {name: {"type": "int32", "shape": [-1]} for name in columns}
    try:
        writers: list[Any] = [FileWriter(str(file)) for file in files]
        for writer in writers:
            writer.add_schema(schema, _DESCRIPTION)
            writer.set_page_size(_PAGE_BYTES if width * len(columns) * 4 <= _PAGE_BYTES // 4 else _LARGE_PAGE_BYTES)
        for block in blocks:
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*(block[name] for name in columns), strict=True)
            ]
            for number, writer in enumerate(writers):
                if part := rows[(number - num_records) % num_files :: num_files]:
                    writer.write_raw_data(part)
            num_records += len(rows)
            block_width = block[columns[0]].shape[1]
            records_by_width[block_width] = records_by_width.get(block_width, 0) + len(rows)
        if num_files > max(1, num_records):
            raise DataError(f"--file_partition is {num_files}, but {path.name} has {num_records} records to deal out")
        for writer in writers:
            writer.commit()
        if num_files > 1:
            _link(files)
    except DataError:
        raise
    except Exception as error:  # FileWriter raises RuntimeError, OSError and its own, without a common base
        raise ResumableError(
            f"{path}: MindRecord cannot be written: {_reason(error)}; check that the disk has space, and run again"
        ) from error
    for file in files:
        for written in (file, Path(f"{file}{INDEX_SUFFIX}")):
            _use_umask(written)
            _sync(written)
    return Written(files, num_records, records_by_width)


def _reason(error: Exception) -> str:
    """MindSpore's own reason, which stands below headings of its error's text as `[ERROR] reason`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    stated = [line.removeprefix("[ERROR]").strip() for line in lines if line.startswith("[ERROR]")]
    return next(iter([*stated, *lines]), type(error).__name__)


def _link(files: Sequence[Path]) -> None:
    """Makes single files a set: readers that open one find the others.

    A MindRecord file begins with the size of its header (8 bytes, little endian) and the header, which is JSON in room
    of 16 MiB: mindspore/ccsrc/minddata/mindrecord/io/shard_header.cc.
    """
    headers = []
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(_SIZE_BYTES), "little")
            headers.append(json.loads(stream.read(size)))
    total = sum(header["compression_size"] for header in headers)
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        header["shard_addresses"] = [path.name for path in files]
        header["shard_id"] = number
        header["compression_size"] = total
        for page in header["page"]:
            page["shard_id"] = number
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if _SIZE_BYTES + len(text) > header["header_size"]:
            raise DataError(
                f"{file}: the header of a set of {len(files)} files has no room; use fewer --file_partition"
            )
        with file.open("r+b") as stream:
            stream.write(len(text).to_bytes(_SIZE_BYTES, "little") + text)


def _use_umask(path: Path) -> None:
    """FileWriter makes files that only their owner can read; trainers run as others, too."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH) & ~mask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
