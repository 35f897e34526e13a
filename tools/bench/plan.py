"""The memory that `llama31-core plan` counts for training on a CPU beside the peak that processes really have.

    python tools/bench/plan.py

Each case is a process of its own (`llama31_core.training.rehearsal`). The interpreter, MindSpore and compiled graphs
are no part of the model: what a process has whose model is next to nothing is measured first and taken off. The plan
counts it as what the device `cpu` reserves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig
from llama31_core.plan import TrainWorkload, find_device, plan_training
from llama31_core.plan.search import POLICIES

_SHAPES: dict[str, dict[str, Any]] = {
    "63M": {"vocab_size": 8192, "dim": 768, "n_layers": 8, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 2048},
    "135M": {"vocab_size": 49152, "dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "ffn_dim": 1536},
    "wide": {"vocab_size": 32000, "dim": 1536, "n_layers": 4, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 4096},
}
_NOTHING = {"vocab_size": 8, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 8, "max_seq_len": 16}
# (shape, tokens of a sequence, sequences, micro-batches)
_CASES = [("63M", 1024, 1, 1), ("63M", 512, 4, 2), ("135M", 512, 1, 1), ("wide", 2048, 1, 1)]


def measure(values: dict[str, Any]) -> int:
    """Peak bytes of a process that trains such a model."""
    command = [sys.executable, "-m", "llama31_core.training.rehearsal", json.dumps(values)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Print a row a case."""
    device = find_device("cpu")
    itself = measure({"config": _NOTHING, "seq_length": 8, "batch_size": 1, "micro_batches": 1, "recompute": "none"})
    print(f"a process without a model: {itself / 1e6:.0f} MB, planned {device.reserved_bytes / 1e6:.0f} MB")
    print(f"{'model':6} {'tokens':>8} {'recomputed':10} {'planned MB':>11} {'measured MB':>12} {'ratio':>6}")
    for name, seq_length, batch_size, micro_batches in _CASES:
        shape = {**_SHAPES[name], "max_seq_len": 4096}
        for recompute in POLICIES:
            sizes: dict[str, Any] = {"seq_length": seq_length, "batch_size": batch_size, "micro_batches": micro_batches}
            work = TrainWorkload(ModelConfig(**shape), ParallelConfig(), **sizes, recompute=recompute)
            planned = plan_training(work, device).largest.memory.total
            measured = measure({"config": shape, **sizes, "recompute": recompute}) - itself
            tokens = f"{micro_batches}x{batch_size}x{seq_length}"
            print(f"{name:6} {tokens:>8} {recompute:10} {planned / 1e6:11,.0f} {measured / 1e6:12,.0f} "
                  f"{planned / measured:6.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
