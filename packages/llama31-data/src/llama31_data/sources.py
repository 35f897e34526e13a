"""Input files: a glob in, open streams and their format out. Nothing here looks into a record."""

from __future__ import annotations

import glob
import gzip
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from llama31_data.errors import DataError

Format = Literal["array", "lines", "parquet", "text"]
_COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclass(frozen=True)
class Source:
    """One input file: `format` is how records lie in it, `compression` what has to be undone first."""

    path: Path
    format: Format
    compression: str | None


def find_sources(patterns: str | Sequence[str], *, plain_text: bool) -> list[Source]:
    """The files that match one or more globs, each once, in the order of the patterns and then of their names.

    Args:
        plain_text: files that are not .json, .jsonl or .parquet by name hold text, not records.

    Raises:
        DataError: a pattern matches no file, or a file cannot be read.
    """
    paths: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        literal = Path(pattern)
        names = [pattern] if literal.is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            what = (
                "is a directory, give a file or a glob" if literal.is_dir() else "no such file, and as a glob no match"
            )
            raise DataError(f"--input_glob {pattern}: {what}")
        paths.update(dict.fromkeys(found))
    return [_describe(path, plain_text=plain_text) for path in paths]


def _describe(path: Path, *, plain_text: bool) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = (suffixes[:-1] if compression else suffixes)[-1:]
    if suffix == [".parquet"]:
        return Source(path, "parquet", None)
    if suffix in ([".jsonl"], [".ndjson"]):
        return Source(path, "lines", compression)
    if plain_text and suffix != [".json"]:
        return Source(path, "text", compression)
    source = Source(path, "array", compression)
    with open_binary(source) as stream:
        head = _read_head(stream, path)
    if not head:
        raise DataError(f"{path}: is empty, expected a JSON array of records or JSON Lines")
    return source if head.startswith(b"[") else Source(path, "lines", compression)


def _read_head(stream: IO[bytes], path: Path) -> bytes:
    with _reading(path):
        while block := stream.read(4096):
            head = block.removeprefix(b"\xef\xbb\xbf").lstrip()
            if head:
                return head
    return b""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what reading or unpacking a file can raise into one DataError with its path."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start} of a block") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def open_binary(source: Source) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked.

    Raises:
        DataError: it cannot be opened, read or unpacked, or zstd is needed and not installed.
    """
    with _reading(source.path), source.path.open("rb") as raw:
        if source.compression == "gzip":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream)
        elif source.compression == "zstd":
            with _open_zstd(raw, source.path) as stream:
                yield stream
        else:
            yield raw


@contextmanager
def _open_zstd(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: needs the zstandard package: pip install 'llama31-data[zstd]'") from error
    try:
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
            yield io.BufferedReader(cast(Any, stream), 1 << 20)
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: is not a zstd file, or is damaged: {error}") from error


@contextmanager
def open_text(source: Source) -> Iterator[IO[str]]:
    """The file's characters, unpacked, UTF-8 with or without a byte order mark; line ends stay as they are."""
    with open_binary(source) as binary:
        yield io.TextIOWrapper(cast(Any, binary), encoding="utf-8-sig", newline="")
