"""What the machine can do at most: reading memory, and matrix products of the best library that is installed.

    python tools/bench/machine.py [--json OUT]

Shares in the other tables are of these. Products are 2048 x 2048 x 2048, the best of several; torch, which calls
oneDNN, is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.memory_bandwidth import read_bandwidth

_SIZE = 2048
_REPEATS = 12
_SLOW_SIZE, _SLOW_S = 256, 0.03  # torch's bfloat16 takes longer where a CPU has no such products; 2048 takes minutes


def products_per_s(multiply: Callable[[int], object]) -> float:
    """Operations a second of the fastest call; of small matrices if those take long."""
    multiply(_SLOW_SIZE)
    small_s = _seconds(multiply, _SLOW_SIZE)
    if small_s > _SLOW_S:
        return 2 * _SLOW_SIZE**3 / small_s
    return 2 * _SIZE**3 / min(_seconds(multiply, _SIZE) for _ in range(_REPEATS))


def _seconds(multiply: Callable[[int], object], size: int) -> float:
    started = time.perf_counter()
    multiply(size)
    return time.perf_counter() - started


def measure(threads: int) -> dict[str, float]:
    """Bytes a second, and operations a second by library and type."""
    found = {"read bandwidth, bytes/s": read_bandwidth(threads)}
    matrix = np.ones((_SIZE, _SIZE), np.float32)
    found["NumPy float32, operations/s"] = products_per_s(lambda size: matrix[:size, :size] @ matrix[:size, :size])
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            ones = torch.ones(_SIZE, _SIZE, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            found[f"torch {name}, operations/s"] = products_per_s(
                lambda size, ones=ones: ones[:size, :size] @ ones[:size, :size]  # type: ignore[misc]
            )
    return found


def main() -> None:
    """Print a line a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    found = measure(args.threads)
    for name, value in found.items():
        print(f"{name:32} {value / 1e9:8.1f} G")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
