"""What CPU ranks of one machine send one another outside graphs, through memory that they share.

A training step sums every gradient over the ranks. MindSpore's AllReduce goes through sockets, which costs a core 0.6
to 0.9 s for 100 MB. Numbers are added in the order of the ranks, so that all of them have the same bits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor

from llama31_core.errors import RankLostError
from llama31_core.parallel.agreement import exchange_texts
from llama31_core.parallel.groups import Group
from llama31_core.parallel.transport import EagerTransport, Move, transport

Floats = npt.NDArray[np.float32]

_FOLDER = Path("/dev/shm")
_CHUNK = 1 << 18  # numbers that go through at once
_LINE = 8  # a rank's counter and process number have a cache line each
_LIVENESS_S = 1.0


def eager_transport(group: Group) -> EagerTransport:
    """How a group sends what is not in a graph. All members call it at the same point of a program."""
    if ms.get_context("device_target") != "CPU":
        return transport()
    if group.name not in _transports:
        memory = _share(group)
        _transports[group.name] = transport() if memory is None else SharedMemory(group, memory)
    return _transports[group.name]


_transports: dict[str, EagerTransport] = {}


def _size(group: Group) -> int:
    return 2 * group.size * _LINE * 8 + 2 * (group.size + 1) * _CHUNK * 4


def _share(group: Group) -> mmap.mmap | None:
    """Memory that all members have, zeros; None on all of them if one cannot: they are on several machines, say.

    The file has no name any more when this returns, so that nothing is left of a rank that is killed.
    """
    name = ""
    # Elsewhere a counter might be seen before the numbers that it says are there.
    if group.index == 0 and platform.machine() == "x86_64":
        with contextlib.suppress(OSError):
            name = _create(_size(group))
    name = exchange_texts(group, name)[0]
    if not name:
        return None
    memory = None
    with contextlib.suppress(OSError), (_FOLDER / name).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), _size(group))
    have_it = all(exchange_texts(group, "" if memory is None else "yes"))
    if group.index == 0:
        (_FOLDER / name).unlink()
    return memory if have_it else None


def _create(size: int) -> str:
    path = _FOLDER / f"llama31-{secrets.token_hex(16)}"
    with path.open("xb") as file:
        path.chmod(0o600)
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # memory that is missing would end the process when it is used
        except OSError:
            path.unlink()
            raise
    return path.name


class SharedMemory:
    """The operations that are used outside graphs, over the ranks of one group; float32, others go through MindSpore.

    Each rank has two areas that it writes, and there are two for sums; calls take them in turns. A rank that begins a
    call has read all of the one before, and nobody gets past a call's first meeting before all have begun it: so an
    area is read by all before it is written again.

    Args:
        memory: zeros, the same for all.
    """

    def __init__(self, group: Group, memory: mmap.mmap) -> None:
        self._group = group
        counters = np.frombuffer(memory, np.int64, 2 * group.size * _LINE).reshape(2, group.size, _LINE)[:, :, 0]
        self._arrived, self._processes = counters
        self._processes[group.index] = os.getpid()
        offset = 2 * group.size * _LINE * 8
        self._areas = np.frombuffer(memory, np.float32, offset=offset).reshape(2, group.size + 1, _CHUNK)
        self._turn = self._meetings = 0

    def all_reduce(self, group: Group) -> Move:
        """The sum of all ranks' tensors."""
        return self._if_float32(self._sum, lambda x: transport().all_reduce(group)(x))

    def reduce_scatter(self, group: Group) -> Move:
        """The rank's part, along the first axis, of the sum of all ranks' tensors."""
        return self._if_float32(self._sum_own_part, lambda x: transport().reduce_scatter(group)(x))

    def all_gather(self, group: Group) -> Move:
        """All ranks' tensors one after the other along the first axis."""
        return self._if_float32(self._gather, lambda x: transport().all_gather(group)(x))

    def _if_float32(self, move: Callable[[Floats], Floats], otherwise: Move) -> Move:
        def moved(x: Tensor) -> Tensor:
            return Tensor.from_numpy(move(x.asnumpy())) if x.dtype == ms.float32 else otherwise(x)

        return moved

    def _sum(self, x: Floats) -> Floats:
        numbers, total, size, index = x.reshape(-1), np.empty_like(x), self._group.size, self._group.index
        for chunk in _chunks(numbers.size, _CHUNK):
            areas = self._next_areas()
            count = chunk.stop - chunk.start
            areas[index, :count] = numbers[chunk]
            self._meet()
            own = slice(count * index // size, count * (index + 1) // size)
            areas[:size, own].sum(axis=0, out=areas[size, own])
            self._meet()
            total.reshape(-1)[chunk] = areas[size, :count]
        return total

    def _sum_own_part(self, x: Floats) -> Floats:
        size, index = self._group.size, self._group.index
        parts = x.reshape(size, -1)
        total = np.empty((x.shape[0] // size, *x.shape[1:]), np.float32)
        for chunk in _chunks(parts.shape[1], _CHUNK // size):
            areas = self._next_areas()
            count = chunk.stop - chunk.start
            areas[index, : size * count].reshape(size, count)[:] = parts[:, chunk]
            self._meet()
            areas[:size, index * count : (index + 1) * count].sum(axis=0, out=total.reshape(-1)[chunk])
        return total

    def _gather(self, x: Floats) -> Floats:
        numbers, size, index = x.reshape(-1), self._group.size, self._group.index
        everything = np.empty((size, numbers.size), np.float32)
        for chunk in _chunks(numbers.size, _CHUNK):
            areas = self._next_areas()
            count = chunk.stop - chunk.start
            areas[index, :count] = numbers[chunk]
            self._meet()
            everything[:, chunk] = areas[:size, :count]
        return everything.reshape(size * x.shape[0], *x.shape[1:])

    def _next_areas(self) -> Floats:
        """(group size + 1, numbers): the ranks' and the one of the sum."""
        self._turn += 1
        areas: Floats = self._areas[self._turn % 2]
        return areas

    def _meet(self) -> None:
        """Wait until all have come as often.

        Raises:
            RankLostError: one of them has ended.
        """
        self._meetings += 1
        self._arrived[self._group.index] = self._meetings
        looked = time.monotonic()
        while self._arrived.min() < self._meetings:
            time.sleep(0.00005)
            if time.monotonic() - looked > _LIVENESS_S:
                self._look_for_the_lost()
                looked = time.monotonic()

    def _look_for_the_lost(self) -> None:
        for rank, process, arrived in zip(self._group.ranks, self._processes, self._arrived, strict=True):
            if arrived < self._meetings and process and not Path(f"/proc/{process}").exists():
                raise RankLostError(
                    f"rank {rank} (process {process}) has ended while the others wait for its gradients"
                )


def _chunks(count: int, size: int) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(count, begin + size))
