"""A checkpoint's files in, the system's page cache filled with them while something else takes time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from llama31_core.checkpoint.files import open_tensor_files

_CHUNK_BYTES = 16 * 2**20  # many at once: the thread takes no turns of the interpreter meanwhile


@contextmanager
def read_ahead(path: Path) -> Iterator[None]:
    """Read a checkpoint from the disk for as long as the block runs, in a thread, so that who reads it later finds it.

    Raises:
        CheckpointError: no checkpoint there.
    """
    opened = open_tensor_files(path)
    opened.close()
    files = sorted({tensor.path for tensor in opened.tensors.values()})
    is_over = Event()
    thread = Thread(target=_read, args=(files, is_over), name="llama31-read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _read(files: Sequence[Path], is_over: Event) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    for path in files:
        try:
            with path.open("rb", buffering=0) as file:
                while not is_over.is_set() and file.readinto(buffer):
                    pass
        except OSError:
            return  # who needs the bytes will say what is wrong
