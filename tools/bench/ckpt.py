"""Speed and memory of llama31-ckpt beside `cp` of the same bytes and beside loading all and saving with MindSpore.

    python tools/bench/ckpt.py --preset llama3.2-1b --rounds 3

makes a bfloat16 checkpoint of that shape with HF's names in a temporary directory (`--directory` says where; it is
removed afterwards) and runs each program in a process of its own, in turn within each round, each round beginning with
another one. All of them end with the output on disk (fsync); `cp` is shown without that too. Before each, the input is
brought to the same state: read through once, so that it is in the page cache as far as it fits, or put out of it with
`--cold`. Figures are medians over the rounds and contain the start of the process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from llama31_core.checkpoint import open_for_rank, parameter_shapes, spell
from llama31_core.checkpoint.dtypes import Array, dtype_of
from llama31_core.checkpoint.writer import TensorSpec, row_chunks, write_safetensors
from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig, plan_shards
from llama31_core.presets import PRESETS

_REPORT = "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
_CONVERT = f"import sys; from llama31_ckpt.cli import main; assert main(sys.argv[1:]) == 0; {_REPORT}"
# Memory that a virtual machine has given back to its host costs whoever uses it next, which would be the first program.
_TOUCH = "import sys, numpy; numpy.empty(int(sys.argv[1]), 'u1')[::4096] = 1"
_TOUCHED_BYTES = 6 * 10**9
_NAIVE = f"""
import os, sys, mindspore
from llama31_core.checkpoint.names import canonical_name
loaded = mindspore.load_checkpoint(sys.argv[1], format="safetensors")
renamed = [dict(name=canonical_name(name, "hf"), data=parameter) for name, parameter in loaded.items()]
mindspore.save_checkpoint(renamed, sys.argv[2])
os.fsync(os.open(sys.argv[2], os.O_RDONLY))
{_REPORT}
"""


REFERENCE = "cp, synced"


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
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}: {result.stderr}")
    if synced is not None:
        descriptor = os.open(synced, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    peak = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("peak ")]
    return seconds, int(peak[0]) / 1024 if peak else 0.0


def set_page_cache(path: Path, *, cold: bool) -> None:
    """Bring a file into the page cache, or put it out of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        block = bytearray(8 << 20)
        while not cold and file.readinto(block):
            pass


def programs(source: Path, out: Path) -> dict[str, tuple[list[str], Path | None]]:
    """What is compared: name -> command, and the file that it leaves for us to sync."""
    weights = source / "model.safetensors"
    convert = [sys.executable, "-c", _CONVERT, "convert", "--input_path", str(source), "--output_path"]
    shard_bytes = weights.stat().st_size * 27 // 100  # tensors are not cut, so a little more than a quarter
    copy = ["cp", "--reflink=never", str(weights), str(out)]
    return {
        REFERENCE: (copy, out),
        "cp": (copy, None),
        "safetensors": ([*convert, str(out)], None),
        "safetensors in 4 shards": ([*convert, str(out), "--max_shard_size", str(shard_bytes)], None),
        ".ckpt": ([*convert, f"{out}.ckpt"], None),
        "MindSpore load and save .ckpt": ([sys.executable, "-c", _NAIVE, str(weights), f"{out}.ckpt"], None),
    }


def measure(
    source: Path, directory: Path, rounds: int, names: Sequence[str], *, cold: bool
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and peak MB of each named program in each round."""
    weights = source / "model.safetensors"
    commands = programs(source, directory / "out")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            subprocess.run([sys.executable, "-c", _TOUCH, str(min(weights.stat().st_size, _TOUCHED_BYTES))], check=True)
            set_page_cache(weights, cold=cold)
            results[name].append(run_process(*commands[name]))
            print(f"round {number + 1}: {name}: {results[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
            for path in directory.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def read_rank(source: Path, config: ModelConfig, rank: int, tp: int) -> tuple[int, int, int, float]:
    """Bytes of split and of replicated tensors, bytes that a tensor parallel rank reads, and the seconds it takes."""
    start = time.perf_counter()
    split = replicated = 0
    shards = plan_shards(config, ParallelConfig(tp=tp), rank)
    slices = {name: shard.slices for name, shard in shards.items()}
    with open_for_rank(source, slices, rank=rank) as weights:
        for name, shard in shards.items():
            weights.read_slice(name, shard.slices)
            size_bytes = 2 * int(np.prod(shard.full_shape))
            split += size_bytes if max(shard.parts) > 1 else 0
            replicated += 0 if max(shard.parts) > 1 else size_bytes
        return split, replicated, weights.bytes_read, time.perf_counter() - start


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama3.2-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where there is room for twice the checkpoint")
    parser.add_argument("--cold", action="store_true", help="each program reads its input from the disk")
    parser.add_argument(
        "--only", nargs="+", metavar="PROGRAM", help="these alone, beside cp with fsync (see the table)"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # what is removed afterwards is up to 32 GB
    config = ModelConfig.preset(arguments.preset)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="llama31-bench-") as scratch:
        directory = Path(scratch)
        size_bytes = make_checkpoint(directory / "hf", config)
        where = "on disk" if arguments.cold else "in the page cache"
        print(f"{arguments.preset}: {size_bytes / 1e9:.2f} GB in bfloat16, {where}")
        print(f"Medians of {arguments.rounds} rounds:\n")
        names = list(programs(directory / "hf", directory))
        if arguments.only is not None:
            if unknown := set(arguments.only) - set(names):
                raise SystemExit(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
            names = [name for name in names if name in (REFERENCE, *arguments.only)]
        results = measure(directory / "hf", directory, arguments.rounds, names, cold=arguments.cold)
        reference = statistics.median(seconds for seconds, _ in results[REFERENCE])
        print(f"| program | s | GB/s | of {REFERENCE} | peak MB |\n|---|---|---|---|---|")
        for name, runs in results.items():
            seconds = statistics.median(run[0] for run in runs)
            peak = statistics.median(run[1] for run in runs)
            memory = f"{peak:.0f}" if peak else ""
            print(
                f"| {name} | {seconds:.2f} | {size_bytes / 1e9 / seconds:.2f} | {reference / seconds:.2f} | {memory} |"
            )
        print("\n| tensor parallel | split | replicated | read of the split ones | s |\n|---|---|---|---|---|")
        for tp in (2, 8):
            split, replicated, read_bytes, seconds = read_rank(directory / "hf", config, 0, tp)
            share = (read_bytes - replicated) / split
            print(f"| {tp} | {split / 1e9:.2f} GB | {replicated / 1e6:.2f} MB | {share:.4f} | {seconds:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
