"""Speed and memory of llama31-ckpt beside `cp` of the same bytes and beside loading all and saving with MindSpore.

    python tools/bench/ckpt.py --preset llama3.2-1b --rounds 3

makes a bfloat16 checkpoint of that shape with HF's names in a temporary directory (`--directory` says where; it is
removed afterwards) and runs each program in a process of its own, in turn within each round. All of them end with the
output on disk (fsync); `cp` is shown without that too. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from llama31_core.checkpoint import open_weights, parameter_shapes, spell
from llama31_core.checkpoint.dtypes import Array, dtype_of
from llama31_core.checkpoint.writer import TensorSpec, row_chunks, write_safetensors
from llama31_core.config import PRESETS, ModelConfig

_REPORT = "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
_CONVERT = f"import sys; from llama31_ckpt.cli import main; assert main(sys.argv[1:]) == 0; {_REPORT}"
_NAIVE = f"""
import os, sys, mindspore
from llama31_core.checkpoint.names import canonical_name
loaded = mindspore.load_checkpoint(sys.argv[1], format="safetensors")
renamed = [dict(name=canonical_name(name, "hf"), data=parameter) for name, parameter in loaded.items()]
mindspore.save_checkpoint(renamed, sys.argv[2])
os.fsync(os.open(sys.argv[2], os.O_RDONLY))
{_REPORT}
"""
COLUMN_PARALLEL = (
    ".wq.weight",
    ".wk.weight",
    ".wv.weight",
    ".w1.weight",
    ".w3.weight",
    "embedding_weight",
    "lm_head.weight",
)
ROW_PARALLEL = (".wo.weight", ".w2.weight")


def make_checkpoint(directory: Path, config: ModelConfig) -> int:
    """Write a checkpoint of random bfloat16 numbers and return its size in bytes."""
    config.save_pretrained(directory)
    pool = (np.random.default_rng(0).standard_normal(1 << 24) * 0.02).astype(ml_dtypes.bfloat16)
    specs = [TensorSpec(spell(n, "hf"), shape, dtype_of("bf16")) for n, shape in parameter_shapes(config).items()]

    def chunks(spec: TensorSpec) -> Iterator[Array]:
        row_items = int(np.prod(spec.shape[1:]))
        for start, stop in row_chunks(spec.shape, row_items * 2):
            yield np.resize(pool, ((stop - start) * row_items,))

    write_safetensors(directory / "model.safetensors", specs, chunks, metadata={"format": "pt"})
    return sum(spec.size_bytes for spec in specs)


def run_process(command: Sequence[str], synced: Path | None = None) -> tuple[float, float]:
    """Seconds a process takes, with fsync of `synced`, and its peak memory in MB (0 if it does not say)."""
    os.sync()
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    if synced is not None:
        descriptor = os.open(synced, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    peak = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("peak ")]
    return seconds, int(peak[0]) / 1024 if peak else 0.0


def measure(source: Path, directory: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and peak MB of each program in each round."""
    out = directory / "out"
    weights = source / "model.safetensors"
    convert = [sys.executable, "-c", _CONVERT, "convert", "--input_path", str(source), "--output_path"]
    copy = ["cp", "--reflink=never", str(weights), str(out)]
    programs: dict[str, tuple[list[str], Path | None]] = {
        "cp": (copy, None),
        "cp, synced": (copy, out),
        "llama31-ckpt -> safetensors": ([*convert, str(out)], None),
        "llama31-ckpt -> .ckpt": ([*convert, f"{out}.ckpt"], None),
        "MindSpore load and save .ckpt": ([sys.executable, "-c", _NAIVE, str(weights), f"{out}.ckpt"], None),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (command, synced) in programs.items():
            results[name].append(run_process(command, synced))
            for path in directory.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def read_rank(source: Path, rank: int, tp: int) -> tuple[int, int, float]:
    """Bytes of tensors that are split, bytes that one tensor-parallel rank reads of them, and the seconds it takes."""
    start = time.perf_counter()
    split_bytes = 0
    with open_weights(source) as reader:
        for name in reader.names():
            shape = reader.shape(name)
            axis = 0 if name.endswith(COLUMN_PARALLEL) else 1 if name.endswith(ROW_PARALLEL) else None
            if axis is None:
                continue
            part = shape[axis] // tp
            bounds = slice(rank * part, (rank + 1) * part)
            reader.read_slice(name, (bounds,) if axis == 0 else (slice(None), bounds))
            split_bytes += 2 * int(np.prod(shape))
        return split_bytes, reader.bytes_read, time.perf_counter() - start


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama3.2-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where there is room for twice the checkpoint")
    arguments = parser.parse_args()
    config = ModelConfig.preset(arguments.preset)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="llama31-bench-") as scratch:
        directory = Path(scratch)
        size_bytes = make_checkpoint(directory / "hf", config)
        print(f"{arguments.preset}: {size_bytes / 1e9:.2f} GB in bfloat16, medians of {arguments.rounds} rounds\n")
        results = measure(directory / "hf", directory, arguments.rounds)
        reference = statistics.median(seconds for seconds, _ in results["cp, synced"])
        print("| program | s | GB/s | of cp, synced | peak MB |\n|---|---|---|---|---|")
        for name, runs in results.items():
            seconds = statistics.median(run[0] for run in runs)
            peak = statistics.median(run[1] for run in runs)
            memory = f"{peak:.0f}" if peak else ""
            print(
                f"| {name} | {seconds:.2f} | {size_bytes / 1e9 / seconds:.2f} | {reference / seconds:.2f} | {memory} |"
            )
        print("\n| tensor parallel | of the split bytes | read by rank 0 | s |\n|---|---|---|---|")
        for tp in (1, 2, 8):
            split_bytes, read_bytes, seconds = read_rank(directory / "hf", 0, tp)
            print(f"| {tp} | {split_bytes / 1e9:.2f} GB | {read_bytes / split_bytes:.4f} | {seconds:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
