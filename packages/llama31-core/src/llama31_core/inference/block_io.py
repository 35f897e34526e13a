"""Copies blocks of a model's cache on its device, and between device and host: block numbers in, nothing out.

Shapes: N rows of the caches. A cache has its blocks, or the slots of its blocks one after the other, on the first axis.
"""

from __future__ import annotations

from itertools import groupby

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llama31_core.checkpoint.dtypes import Array
from llama31_core.inference.batch import BlockMove
from llama31_core.inference.values import numpy_dtype

_Indexes = npt.NDArray[np.int32]


class _Copy(nn.Cell):  # type: ignore[misc]
    """Rows `sources` of every cache to rows `targets`."""

    def __init__(self, caches: list[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.caches = ParameterTuple(caches)

    def construct(self, sources_N: Tensor, targets_N: Tensor) -> Tensor:
        for cache in self.caches:
            ops.scatter_update(cache, targets_N, ops.gather(cache, sources_N, 0))
        return targets_N


class _Read(nn.Cell):  # type: ignore[misc]
    """Rows of every cache, as float32 (which holds every smaller type exactly)."""

    def __init__(self, caches: list[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.caches = ParameterTuple(caches)

    def construct(self, sources_N: Tensor) -> Tensor:
        rows = [ops.gather(cache, sources_N, 0).astype(ms.float32) for cache in self.caches]
        return ops.stack(rows)


class _Write(nn.Cell):  # type: ignore[misc]
    """Given rows to every cache."""

    def __init__(self, caches: list[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.caches = ParameterTuple(caches)

    def construct(self, targets_N: Tensor, rows: Tensor) -> Tensor:
        for index, cache in enumerate(self.caches):
            ops.scatter_update(cache, targets_N, rows[index].astype(cache.dtype))
        return targets_N


class BlockIO:
    """Moves blocks of a cache.

    Args:
        caches: of every layer, all of one shape and type.
        num_blocks: on the device.
        num_host_blocks: on the host.
    """

    def __init__(self, caches: list[Parameter], num_blocks: int, num_host_blocks: int) -> None:
        shape = caches[0].shape
        self._rows_per_block = shape[0] // num_blocks
        self._block_shape = (len(caches), self._rows_per_block, *shape[1:])
        self._host = np.zeros((num_host_blocks, *self._block_shape), numpy_dtype(caches[0]))
        self._copy, self._read, self._write = _Copy(caches), _Read(caches), _Write(caches)
        any_rows = Tensor(shape=[None], dtype=ms.int32)
        self._copy.set_inputs(any_rows, any_rows)
        self._read.set_inputs(any_rows)
        self._write.set_inputs(any_rows, Tensor(shape=[len(caches), None, *shape[1:]], dtype=ms.float32))

    def move(self, moves: list[BlockMove]) -> None:
        """Carry out moves; those of one kind that follow each other, and do not need each other, go together."""
        for kind, some in groupby(moves, key=lambda move: move.kind):
            for batch in _independent(list(some)):
                sources, targets = [move.source for move in batch], [move.target for move in batch]
                if kind == "copy":
                    self._copy(Tensor(self._rows(sources)), Tensor(self._rows(targets)))
                elif kind == "out":
                    rows = self._read(Tensor(self._rows(sources))).asnumpy()
                    self._host[targets] = np.moveaxis(rows.reshape(self._batched(len(batch))), 1, 0)
                elif kind == "in":
                    self._put(targets, self._host[sources])
                else:
                    self._put(targets, np.zeros((len(batch), *self._block_shape), np.float32))

    def _put(self, targets: list[int], blocks: Array) -> None:
        rows = np.moveaxis(blocks.astype(np.float32), 0, 1).reshape(self._block_shape[0], -1, *self._block_shape[2:])
        self._write(Tensor(self._rows(targets)), Tensor(np.ascontiguousarray(rows)))

    def _rows(self, blocks: list[int]) -> _Indexes:
        first = np.asarray(blocks, np.int32)[:, None] * self._rows_per_block
        rows: _Indexes = (first + np.arange(self._rows_per_block, dtype=np.int32)).reshape(-1)
        return rows

    def _batched(self, num_blocks: int) -> tuple[int, ...]:
        layers, rows, *rest = self._block_shape
        return (layers, num_blocks, rows, *rest)


def _independent(moves: list[BlockMove]) -> list[list[BlockMove]]:
    """Runs of moves of one kind in which nothing reads or writes what another one wrote."""
    batches: list[list[BlockMove]] = []
    written: set[int] = set()
    for move in moves:
        reads_written = move.kind == "copy" and move.source in written
        if not batches or reads_written or move.target in written:
            batches.append([])
            written = set()
        batches[-1].append(move)
        written.add(move.target)
    return batches
