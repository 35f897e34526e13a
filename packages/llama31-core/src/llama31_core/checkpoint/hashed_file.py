"""Writing one file fast and knowing its sha256: bytes in, a file on disk and its hash out.

The bytes go from a few aligned blocks straight to the disk (O_DIRECT), past the page cache: a checkpoint is larger than
what the cache should hold, and filling the cache costs more than the writing. While one block is filled, others are
written and hashed in threads. A file system that cannot do this is written the usual way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_BLOCK_BYTES = 8 << 20
_NUM_BLOCKS = 4
_ALIGNMENT = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


@dataclass(frozen=True)
class WrittenFile:
    """A finished file, as the manifest lists it."""

    name: str
    sha256: str
    size_bytes: int


class HashedFile:
    """A new file to write from its beginning to its end, as a context manager; `finished` after the block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._descriptor = _open(path)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)  # one, for the order of the blocks
        self._writer = ThreadPoolExecutor(2)  # two, so that the disk never waits for the next block
        self._blocks = [mmap.mmap(-1, _BLOCK_BYTES) for _ in range(_NUM_BLOCKS)]  # aligned to pages
        self._pending: list[list[Future[None]]] = [[] for _ in self._blocks]
        self._current = self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which is copied."""
        done = 0
        while done < len(data):
            count = min(len(data) - done, _BLOCK_BYTES - self._filled)
            self._blocks[self._current][self._filled : self._filled + count] = data[done : done + count]
            self._filled += count
            self.size_bytes += count
            done += count
            if self._filled == _BLOCK_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        """Have the current block written and hashed, and go on with the next one that is free."""
        block = memoryview(self._blocks[self._current])
        aligned = -(-self._filled // _ALIGNMENT) * _ALIGNMENT  # what is too much is cut off at the end
        self._pending[self._current] = [
            self._hasher.submit(self._hash.update, block[: self._filled]),
            self._writer.submit(_write_at, self._descriptor, block[:aligned], self.size_bytes - self._filled),
        ]
        self._current, self._filled = (self._current + 1) % len(self._blocks), 0
        self._wait_for(self._current)

    def _wait_for(self, block: int) -> None:
        for future in self._pending[block]:
            future.result()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._writer.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def _finish(self) -> None:
        if self._filled:
            self._hand_over()
        for block in range(len(self._blocks)):
            self._wait_for(block)
        os.ftruncate(self._descriptor, self.size_bytes)

    def finished(self) -> WrittenFile:
        return WrittenFile(self.path.name, self._hash.hexdigest(), self.size_bytes)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_at(descriptor: int, block: memoryview, offset: int) -> None:
    done = 0
    while done < len(block):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)  # before: the other writer may change them meanwhile
        try:
            done += os.pwrite(descriptor, block[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & _O_DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)  # opened, but it wants another alignment
