"""What the device can do and holds: its rate in a large matrix product, and the memory in use."""

from __future__ import annotations

import resource
import time
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

_SIZE = 1536


@cache
def measure_flops_per_s() -> float:
    """Operations a second in the best of several float32 matrix products; under a second on two cores."""
    product = ops.MatMul()
    matrix = Tensor(np.full((_SIZE, _SIZE), 0.5, np.float32))
    product(matrix, matrix)[0, :1].asnumpy()
    best_s = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        product(matrix, matrix)[0, :1].asnumpy()
        best_s = min(best_s, time.perf_counter() - started)
    return float(2 * _SIZE**3 / best_s)


def peak_memory_bytes() -> int:
    """The most memory that was in use until now: of the process on a CPU, of the device elsewhere."""
    if ms.get_context("device_target") == "CPU":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(ms.runtime.max_memory_allocated())
