"""The manifest beside a MindRecord set: what is in it, for whom, and the sha256 of every file; JSON both ways.

It holds no time, host or worker count: two runs of the same options over the same input give the same manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama31_data.errors import DataError, ResumableError

FORMAT_VERSION = 1
SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of the output."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class SetEntry:
    """One MindRecord set: the name that readers open first, and how many records of which width it has, in order."""

    name: str
    files: tuple[str, ...]
    num_records: int
    records_by_width: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """See the README for every field."""

    format_version: int
    tool_version: str
    dataset_type: str
    template: str | None
    layout: str
    seq_length: int
    columns: tuple[str, ...]
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    tokenizer_sha256: str
    model_file: str
    sources: tuple[str, ...]
    counts: dict[str, int]
    fill_rate: float
    sets: tuple[SetEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def num_records(self) -> int:
        """Of all sets."""
        return sum(entry.num_records for entry in self.sets)

    def to_json(self) -> str:
        """The manifest file's text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output is."""
    return output.with_name(output.name + SUFFIX)


def describe_file(path: Path) -> FileEntry:
    """Name, size and sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.name, path.stat().st_size, digest)


def load_manifest(output: Path) -> Manifest:
    """The manifest of a preprocessed output, given the path that --output_file had.

    Raises:
        DataError: there is none (the run did not end, or the file is not ours), or it is of another format.
    """
    path = manifest_path(output)
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; expected the manifest that llama31-data preprocess writes when it is done"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        found = data.get("format_version") if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path}: format_version is {found!r}, this version reads {FORMAT_VERSION}; preprocess again")
    try:
        data["sets"] = tuple(SetEntry(**{**entry, "files": tuple(entry["files"])}) for entry in data["sets"])
        data["files"] = tuple(FileEntry(**entry) for entry in data["files"])
        for name in ("columns", "sources"):
            data[name] = tuple(data[name])
        return Manifest(**data)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: is not a manifest of llama31-data: {error}") from error


def check_files(output: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Checks that every file is there with its size and, if asked, its sha256.

    Raises:
        DataError: naming the first file that differs.
    """
    for entry in manifest.files:
        path = output.parent / entry.name
        if not path.is_file():
            raise DataError(f"{path}: is missing; the manifest lists it, preprocess again with --overwrite")
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise DataError(f"{path}: has {size} bytes, the manifest says {entry.size_bytes}; preprocess again")
        if hashes and describe_file(path).sha256 != entry.sha256:
            raise DataError(f"{path}: does not have the sha256 of the manifest; preprocess again")


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        discard(part)
        raise ResumableError(f"{path}: cannot be written: {error.strerror}") from error


def discard(path: Path) -> None:
    """Removes a file if it is there and can be: a read-only disk refuses even where it is not."""
    with suppress(OSError):
        path.unlink()
