"""A checkpoint's files in, the system's page cache filled with them while something else takes time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from llama31_core.checkpoint.files import open_tensor_files
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.errors import CheckpointError

_CHUNK_BYTES = 16 * 2**20  # many at once: the thread takes no turns of the interpreter meanwhile


@contextmanager
def read_ahead(path: Path) -> Iterator[None]:
    """Read a checkpoint from the disk for as long as the block runs, in a thread, so that who reads it later finds it.

    Raises:
        CheckpointError: no checkpoint there.
    """
    opened = open_tensor_files(path)
    is_over = Event()
    thread = Thread(target=_read, args=(opened.files, is_over), name="llama31-read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        opened.close()


def _read(files: Sequence[OpenFile], is_over: Event) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for file in files:
        for offset in range(0, file.size_bytes, _CHUNK_BYTES):
            if is_over.is_set():
                return
            try:
                file.read_into(offset, buffer[: file.size_bytes - offset])
            except CheckpointError:
                return  # who needs the bytes will say what is wrong
