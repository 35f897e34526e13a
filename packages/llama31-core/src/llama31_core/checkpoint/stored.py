"""Tensors that lie in files as runs of bytes: file positions in, numpy arrays out, and only the bytes asked for read.

Both safetensors and MindSpore `.ckpt` files come down to this: each tensor is one or more segments of one file, row
major, little endian.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock

import numpy as np

from llama31_core.checkpoint.dtypes import Array, DType, array_of_lines
from llama31_core.errors import CheckpointError

MAX_DIMS = 16


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes are: `segments` of (offset, size in bytes) that follow each other."""

    path: Path
    shape: tuple[int, ...]
    dtype: DType
    segments: tuple[tuple[int, int], ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size_bytes


def is_shape(dims: object) -> bool:
    """Whether `dims` is a list of sizes that an array can have; files may claim anything."""
    if not isinstance(dims, list) or len(dims) > MAX_DIMS:
        return False
    if not all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0 for dim in dims):
        return False
    size: int = math.prod(dim for dim in dims if dim)
    return size < 2**48


class OpenFile:
    """A file opened for positioned reads; safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`.

        Raises:
            CheckpointError: the file ends before that.
        """
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} is truncated: it ends at byte {offset + done}")
            done += count

    def close(self) -> None:
        self._close()


class TensorFiles:
    """Named tensors in one or more files.

    Attributes:
        bytes_read: bytes of tensor data read so far (headers not counted).
    """

    def __init__(self, source: Path, tensors: dict[str, StoredTensor], files: Sequence[OpenFile]) -> None:
        self.source = source
        self.tensors = tensors
        self.bytes_read = 0
        self._lock = Lock()
        self._files = {file.path: file for file in files}

    @property
    def files(self) -> tuple[OpenFile, ...]:
        """Those that hold them."""
        return tuple(self._files.values())

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        """The part of a tensor that `index` selects; axes that it does not name are taken whole.

        Raises:
            CheckpointError: the file ends early.
            ValueError: the index has too many axes or a step.
        """
        tensor = self.tensors[name]
        bounds = resolve_index(tensor.shape, index)
        result = array_of_lines([stop - start for start, stop in bounds], tensor.dtype.numpy)
        if result.size:
            view = result.reshape(-1).view(np.uint8).data
            done = 0
            for start, size in _byte_runs(tensor.shape, bounds, tensor.dtype.size_bytes):
                self._read_run(tensor, start, view[done : done + size])
                done += size
            with self._lock:
                self.bytes_read += done
        return result

    def _read_run(self, tensor: StoredTensor, start: int, view: memoryview) -> None:
        """Bytes from `start` of the tensor on, across its segments."""
        file, done = self._files[tensor.path], 0
        for offset, size in tensor.segments:
            if start < size and done < len(view):
                count = min(size - start, len(view) - done)
                file.read_into(offset + start, view[done : done + count])
                done += count
                start = 0
            else:
                start = max(0, start - size)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def resolve_index(shape: tuple[int, ...], index: Sequence[slice]) -> list[tuple[int, int]]:
    """(start, stop) of every axis of `shape`."""
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for a tensor of shape {shape}")
    bounds = []
    for axis, length in enumerate(shape):
        start, stop, step = (index[axis] if axis < len(index) else slice(None)).indices(length)
        if step != 1:
            raise ValueError("slices of a stored tensor must have step 1")
        bounds.append((start, max(start, stop)))
    return bounds


def _byte_runs(shape: tuple[int, ...], bounds: list[tuple[int, int]], item: int) -> Iterator[tuple[int, int]]:
    """(first byte, size) of the longest contiguous runs that make up the selection, in order."""
    strides = [item * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # The innermost axis that is not taken whole ends a run; axes outside it are walked.
    partial = [axis for axis, (start, stop) in enumerate(bounds) if stop - start != shape[axis]]
    if not partial:
        yield 0, item * math.prod(shape)
        return
    last = partial[-1]
    start, stop = bounds[last]
    run = (stop - start) * strides[last]
    for outer in product(*(range(*bounds[axis]) for axis in range(last))):
        yield sum(i * stride for i, stride in zip(outer, strides, strict=False)) + start * strides[last], run
