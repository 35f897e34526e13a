"""Files written past the page cache hold what was written, whatever the sizes and whatever the file system allows."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_core.checkpoint import hashed_file
from llama31_core.checkpoint.hashed_file import HashedFile

BLOCK = 8192
_refused = OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "_BLOCK_BYTES", BLOCK)


def _refusing_open() -> Callable[..., int]:
    real = os.open

    def open_(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & hashed_file._O_DIRECT:
            raise _refused
        return real(path, flags, mode)

    return open_


def _refusing_pwrite() -> Callable[..., int]:
    """Takes no direct writes but lets the file be opened for them."""
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & hashed_file._O_DIRECT:
            raise _refused
        return real(descriptor, data, offset)

    return pwrite


def _overtaken_pwrite() -> Callable[..., int]:
    """Refuses a direct write while the other writer, refused as well, goes over to plain ones."""
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & hashed_file._O_DIRECT:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~hashed_file._O_DIRECT)
            raise _refused
        return real(descriptor, data, offset)

    return pwrite


def _halving_pwrite() -> Callable[..., int]:
    real = os.pwrite
    return lambda descriptor, data, offset: real(descriptor, data[: max(1, len(data) // 2)], offset)


def _write(path: Path, pieces: list[bytes]) -> None:
    with HashedFile(path) as file:
        for piece in pieces:
            file.write(piece)
    whole = b"".join(pieces)
    assert path.read_bytes() == whole
    assert file.finished() == hashed_file.WrittenFile(path.name, hashlib.sha256(whole).hexdigest(), len(whole))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5 * BLOCK), max_size=8), seed=st.integers(0, 1 << 32))
def test_any_pieces(sizes: list[int], seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    _write(tmp_path / "file", [rng.randbytes(size) for size in sizes])


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("open", _refusing_open),
        ("pwrite", _refusing_pwrite),
        ("pwrite", _overtaken_pwrite),
        ("pwrite", _halving_pwrite),
    ],
)
def test_file_systems_that_refuse_direct_writes(
    name: str, build: Callable[[], Callable[..., int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, build())
    for size in (0, 1, BLOCK - 1, BLOCK, 9 * BLOCK + 5):
        _write(tmp_path / "file", [os.urandom(size)])


def test_a_file_system_in_memory(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no /dev/shm")
    path = shared / f"llama31-{os.getpid()}"
    try:
        _write(path, [os.urandom(5 * BLOCK + 3)])
    finally:
        path.unlink(missing_ok=True)


def test_a_failing_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    for size in (1, 20 * BLOCK):
        with pytest.raises(OSError, match="Input/output error"), HashedFile(tmp_path / "file") as file:
            file.write(bytes(size))
