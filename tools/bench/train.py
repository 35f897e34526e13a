"""Training steps beside transformers and torch: speed, peak memory, time to the first step; packed beside padded data.

`python tools/bench/train.py` prints the tables; `--data alpaca.json --model_dir DIR` adds packed beside padded records.
Contenders are processes that hold their model and take steps in turn, so that what else the machine does meets both;
ratios are medians over the pairs of steps. The first step of each is apart: it compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import train_contenders
from bench.tokenizer_timing import print_table

Figures = dict[str, Any]
_SHAPES = "25M,4,512 25M,1,2048 135M,2,512 135M,1,2048"


class Contender:
    """A process with a model in it."""

    def __init__(self, name: str, size: str, batch: int, tokens: int, threads: int, data: str = "") -> None:
        self.name, self.tokens = name, batch * tokens
        variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--child", name, size, str(batch), str(tokens), data]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.first = self.step()
        self.ready_s = time.perf_counter() - started
        self.steps: list[Figures] = []

    def step(self) -> Figures:
        """Take one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                figures: Figures = json.loads(line)
                return figures
        raise SystemExit(f"{self.name} ended, exit code {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def rate(self, what: str) -> float:
        """Tokens or labels a second, the median."""
        return float(median((self.tokens if what == "tokens" else s["labels"]) / s["step_s"] for s in self.steps))

    def peak_gb(self) -> float:
        return float(self.steps[-1]["peak_gb"])


def serve_steps(name: str, size: str, batch: str, tokens: str, data: str) -> None:
    """What a contender's process does."""
    step = train_contenders.BUILDERS[name](size, int(batch), int(tokens), data)
    for _ in sys.stdin:
        figures = train_contenders.timed(step)
        figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(figures), flush=True)


def take_turns(contenders: list[Contender], rounds: int) -> None:
    for number in range(rounds):
        for contender in contenders if number % 2 else contenders[::-1]:
            contender.steps.append(contender.step())
            print(f"  {contender.name}: {contender.steps[-1]['step_s']:.2f} s", file=sys.stderr)
    for contender in contenders:
        contender.close()


def beside_torch(shapes: list[tuple[str, int, int]], rounds: int, threads: int) -> None:
    rows: list[Sequence[str]] = []
    for size, batch, tokens in shapes:
        ours, torch = (Contender(name, size, batch, tokens, threads) for name in ("llama31", "torch"))
        take_turns([ours, torch], rounds)
        ratio = median(b["step_s"] / a["step_s"] for a, b in zip(ours.steps, torch.steps, strict=True))
        rows.append([
            f"{size}, {batch} x {tokens}", f"{ours.rate('tokens'):.0f}", f"{torch.rate('tokens'):.0f}", f"{ratio:.2f}x",
            f"{ours.peak_gb():.2f}", f"{torch.peak_gb():.2f}", f"{ours.peak_gb() / torch.peak_gb():.2f}x",
            f"{ours.first['step_s']:.1f} ({ours.ready_s:.1f})", f"{torch.first['step_s']:.1f} ({torch.ready_s:.1f})",
        ])  # fmt: skip
    header = [
        "model, batch",
        "tokens/s",
        "torch",
        "ratio",
        "peak GB",
        "torch",
        "ratio",
        "first step s (+ start)",
        "torch",
    ]
    print_table(f"Training steps in float32, {threads} threads, medians of {rounds}", header, rows)


def packed_beside_padded(data: Path, model_dir: Path, tokens: int, rounds: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        contenders = []
        for layout in ("packed", "padded"):
            path = f"{work}/{layout}.mindrecord"
            command = ["preprocess", "--input_glob", str(data), "--model_file", str(model_dir), "--schema", "alpaca"]
            command += ["--seq_length", str(tokens), "--output_file", path] + ["--packing"] * (layout == "packed")
            subprocess.run([sys.executable, "-m", "llama31_data", *command], check=True, stdout=subprocess.DEVNULL)
            contenders.append(Contender("llama31", "135M", 2, tokens, threads, path))
        take_turns(contenders, rounds)
        packed, padded = (c.rate("labels") for c in contenders)
        rows: list[Sequence[str]] = [[f"2 x {tokens}", f"{packed:.1f}", f"{padded:.1f}", f"{packed / padded:.2f}x"]]
        print_table("Label tokens/s on instruction data", ["batch", "packed", "padded", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=_SHAPES, metavar="SIZE,BATCH,TOKENS …")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, help="instruction records in Alpaca's schema")
    parser.add_argument("--model_dir", type=Path, help="whose tokenizer they are read with")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve_steps(*arguments.child)
        return
    shapes = [(size, int(b), int(t)) for size, b, t in (text.split(",") for text in arguments.shapes.split())]
    beside_torch(shapes, arguments.rounds, arguments.threads)
    if arguments.data is not None:
        packed_beside_padded(arguments.data, arguments.model_dir, 512, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
