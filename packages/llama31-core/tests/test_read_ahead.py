"""Reading a checkpoint before it is wanted: what of it the system holds afterwards."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llama31_core.checkpoint import read_ahead as module
from llama31_core.checkpoint.read_ahead import read_ahead
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.errors import CheckpointError

_SIZE = 8 * 2**20


def cached_share(path: Path) -> float:
    """The part of a file's pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found)
        del start  # a mapping with a pointer into it does not close
        assert not failed
    return sum(page & 1 for page in found) / pages


def drop(path: Path) -> None:
    """Put a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"model.norm_out.weight": np.zeros(_SIZE // 4, np.float32)}, path)
    drop(path)
    return tmp_path


def test_the_files_are_in_memory_when_there_was_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint / "model.safetensors"
    is_read = np.zeros(path.stat().st_size, np.bool_)  # some file systems have all of it in memory in any case (tmpfs)
    read_into = OpenFile.read_into

    def noted(self: OpenFile, offset: int, view: memoryview) -> None:
        read_into(self, offset, view)
        is_read[offset : offset + len(view)] = True

    monkeypatch.setattr(OpenFile, "read_into", noted)
    deadline_s = time.monotonic() + 30
    with read_ahead(checkpoint):
        while not is_read.all() or cached_share(path) < 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_a_file_that_shrinks_ends_it_quietly(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint / "model.safetensors"
    raised: list[CheckpointError] = []
    problems: list[object] = []
    read_into = OpenFile.read_into

    def shrinking(self: OpenFile, offset: int, view: memoryview) -> None:
        if threading.current_thread().name == "llama31-read-ahead":
            os.truncate(path, 4096)
        try:
            read_into(self, offset, view)
        except CheckpointError as error:
            raised.append(error)
            raise

    monkeypatch.setattr(OpenFile, "read_into", shrinking)
    monkeypatch.setattr(threading, "excepthook", problems.append)
    deadline_s = time.monotonic() + 30
    with read_ahead(checkpoint):
        while not raised:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert not problems


def test_it_ends_with_the_block(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)  # hours of it
    with pytest.raises(KeyboardInterrupt), read_ahead(checkpoint):
        raise KeyboardInterrupt
    assert "llama31-read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no"), read_ahead(tmp_path):
        raise AssertionError("the block must not run")
