"""Copies blocks of a cache that lies in this process's memory: block numbers in, nothing out, no graph compiled."""

from __future__ import annotations

import ctypes

import numpy as np
from mindspore import Parameter

from llama31_core.checkpoint.dtypes import Array
from llama31_core.inference.batch import BlockMove
from llama31_core.inference.values import numpy_dtype


class BlockMemory:
    """Moves blocks as `BlockIO` does, of caches that no graph writes, so that they stay where they are.

    Args:
        caches: of every layer, all of one shape and type.
        num_blocks: of a cache.
        num_host_blocks: kept beside it.
    """

    def __init__(self, caches: list[Parameter], num_blocks: int, num_host_blocks: int) -> None:
        self._held = caches  # whose memory the arrays below are, without owning it
        self._caches = [_memory(cache).reshape(num_blocks, -1) for cache in caches]
        self._host = np.zeros((len(caches), num_host_blocks, self._caches[0].shape[1]), self._caches[0].dtype)

    def move(self, moves: list[BlockMove]) -> None:
        """Carry out moves in their order."""
        for move in moves:
            for cache, host in zip(self._caches, self._host, strict=True):
                if move.kind == "copy":
                    cache[move.target] = cache[move.source]
                elif move.kind == "out":
                    host[move.target] = cache[move.source]
                elif move.kind == "in":
                    cache[move.target] = host[move.source]
                else:
                    cache[move.target] = 0


def _memory(cache: Parameter) -> Array:
    memory = (ctypes.c_uint8 * cache.nbytes).from_address(cache.data_ptr())
    return np.frombuffer(memory, numpy_dtype(cache)).reshape(cache.shape)
