"""What the device computes in, can do and holds: number type, rate in a large matrix product, memory in use."""

from __future__ import annotations

import time
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from llama31_core.precision import DtypeName, Precision
from llama31_core.training.process_memory import peak_bytes

_SIZE_ON_CPU, _SIZE = 1536, 8192  # a smaller product takes an NPU no longer than to start it


def training_precision(compute: DtypeName = "bfloat16") -> Precision:
    """What the device trains in when a run file asks for these products.

    Weights, their gradients and AdamW's moments are float32 whatever it is: a change of a weight is often less than the
    8 bits of a bfloat16 can tell (Micikevicius et al. 2018, section 3.1).

    Raises:
        ConfigError: the device cannot.
    """
    return Precision.on(ms.get_context("device_target"), param="float32", compute=compute)


@cache
def measure_flops_per_s(dtype: ms.Type) -> float:
    """Operations a second in the best of several matrix products of a type; under a second on two cores."""
    size = _SIZE_ON_CPU if ms.get_context("device_target") == "CPU" else _SIZE
    product = ops.MatMul()
    matrix = Tensor(np.full((size, size), 0.5, np.float32), dtype)
    product(matrix, matrix)[0, :1].asnumpy()
    best_s = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        product(matrix, matrix)[0, :1].asnumpy()
        best_s = min(best_s, time.perf_counter() - started)
    return float(2 * size**3 / best_s)


def peak_memory_bytes() -> int:
    """The most memory that was in use until now: of the process on a CPU, of the device elsewhere."""
    if ms.get_context("device_target") == "CPU":
        return peak_bytes()
    return int(ms.runtime.max_memory_allocated())
