"""Blocks of records in, a MindRecord set of one or more files out.

What MindSpore's FileWriter writes depends on the records, their order and the base name of the file, not on time,
directory or process (checked in tests): so equal blocks give equal bytes. It writes in place, therefore callers give
it a directory of their own and move the files when all are complete.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama31_data.errors import DataError, ResumableError
from llama31_data.layouts import Block

INDEX_SUFFIX = ".db"
_DESCRIPTION = "llama31"


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


def write_set(path: Path, columns: Sequence[str], blocks: Iterable[Block], num_files: int = 1) -> Written:
    """Writes a MindRecord set. Files that are there are replaced.

    Args:
        path: of the set; with several files each gets its number behind this name.
        columns: int32 columns that every block has.
        num_files: among how many files FileWriter spreads the records.

    Raises:
        DataError: MindSpore could not write, for instance for want of disk space.
    """
    from mindspore.mindrecord import FileWriter

    files = set_files(path, num_files)
    for file in files:
        file.unlink(missing_ok=True)
        Path(f"{file}{INDEX_SUFFIX}").unlink(missing_ok=True)
    num_records = 0
    records_by_width: dict[int, int] = {}
    try:
        writer: Any = FileWriter(str(path), num_files)
        writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in columns}, _DESCRIPTION)
        for block in blocks:
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*(block[name] for name in columns), strict=True)
            ]
            if not rows:
                continue
            writer.write_raw_data(rows)
            num_records += len(rows)
            width = block[columns[0]].shape[1]
            records_by_width[width] = records_by_width.get(width, 0) + len(rows)
        writer.commit()
    except DataError:
        raise
    except Exception as error:  # FileWriter raises RuntimeError, OSError and its own, without a common base
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ResumableError(
            f"{path}: MindRecord cannot be written: {reason}; check that the disk has space, and run again"
        ) from error
    for file in files:
        for written in (file, Path(f"{file}{INDEX_SUFFIX}")):
            _use_umask(written)
            _sync(written)
    return Written(files, num_records, records_by_width)


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
