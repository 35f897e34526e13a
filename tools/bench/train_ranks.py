"""Weak scaling of training over data parallel ranks: one rank beside two, each with one thread and the same batch.

`python tools/bench/train_ranks.py` runs `llama31-core finetune` on a model of random weights, alone and under
msrun_launcher.sh, in turns, and prints tokens/s of all ranks; 1.00 is twice as much with two ranks. Beside them, two
runs of one rank each at once, which share nothing but the machine: what two ranks could reach at most. A rank is kept
on a core of its own, because MindSpore has as many threads as there are cores, whatever OMP_NUM_THREADS says. The first
two steps of each run are left out: they compile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from mindspore.mindrecord import FileWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tokenizer_timing import print_table
from bench.train_contenders import model_config
from free_port import free_port

from llama31_core.checkpoint import parameter_shapes, save_weights
from llama31_core.checkpoint.dtypes import Array

ROOT = Path(__file__).resolve().parents[2]
_NUM_RANKS, _WARM_UP = 2, 2
_CORE = "LLAMA31_BENCH_CORE"


def make_inputs(folder: Path, size: str, tokens: int, num_records: int) -> None:
    """A model directory of random weights, and MindRecord data of random ids."""
    config, rng = model_config(size), np.random.default_rng(0)

    def weights() -> Iterator[tuple[str, Array]]:
        for name, shape in parameter_shapes(config).items():
            yield name, rng.normal(float(len(shape) == 1), 0.02, shape).astype(np.float32)

    (folder / "model").mkdir()
    config.save_pretrained(folder / "model")
    save_weights(folder / "model", weights())
    writer = FileWriter(str(folder / "train.mindrecord"))
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")})
    for _ in range(num_records):
        ids = rng.integers(0, config.vocab_size, tokens + 1).astype(np.int32)
        writer.write_raw_data([{"input_ids": ids, "labels": ids}])
    writer.commit()


def run_on_a_core(arguments: list[str]) -> int:
    """`llama31-core` on the core of the rank's number."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ.get("RANK_ID") or os.environ[_CORE])]})
    from llama31_core.cli import main

    return main(arguments)


def start_run(
    folder: Path, name: str, core: int, ranks: int, batch: int, tokens: int, steps: int
) -> subprocess.Popen[str]:
    run_file, output = ROOT / "configs" / "finetune_smollm2_135m.yaml", folder / name
    values = {
        "load_checkpoint": folder / "model",
        "auto_trans_ckpt": True,
        "output_dir": output,
        "train_dataset.data_loader.dataset_dir": folder / "train.mindrecord",
        "model.model_config.seq_length": tokens,
        "runner_config.batch_size": batch,
        "runner_config.max_steps": steps,
        "use_parallel": ranks > 1,
        "parallel_config.data_parallel": ranks,
    }
    program = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--on-a-core",
        "finetune",
        run_file,
        *(f"{k}={v}" for k, v in values.items()),
    ]
    command = list(map(str, program))
    if ranks > 1:
        launcher = ["bash", str(ROOT / "tools" / "msrun_launcher.sh"), " ".join(command), str(ranks), str(free_port())]
        command = [*launcher, str(folder / f"{name}_log"), "True", "120"]
    variables = os.environ | {
        "OMP_NUM_THREADS": "1",
        "LLAMA31_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        _CORE: str(core),
    }
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def step_times(folder: Path, name: str, run: subprocess.Popen[str]) -> list[float]:
    """Seconds of each step of a run, when it has ended."""
    _, errors = run.communicate()
    if run.returncode:
        raise SystemExit(f"{name} ended, exit code {run.returncode}: {errors[-2000:]}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step_time_s"] for row in rows if row["kind"] == "step"][_WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="25M,4,512", metavar="SIZE,BATCH,TOKENS")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of a run, after two that compile")
    arguments = parser.parse_args()
    size, batch, tokens = arguments.shape.split(",")[0], *map(int, arguments.shape.split(",")[1:])
    times: dict[str, list[float]] = {"alone": [], "ranks": [], "apart": []}
    programs = {"alone": (1, 1), "ranks": (1, _NUM_RANKS), "apart": (_NUM_RANKS, 1)}  # runs at once, ranks of each
    with tempfile.TemporaryDirectory() as work:
        folder, steps = Path(work), arguments.steps + _WARM_UP
        make_inputs(folder, size, tokens, _NUM_RANKS * batch * steps)
        for number in range(arguments.rounds):
            for kind in sorted(times, reverse=bool(number % 2)):
                copies, ranks = programs[kind]
                names = [f"{kind}_{number}_{copy}" for copy in range(copies)]
                runs = [start_run(folder, name, core, ranks, batch, tokens, steps) for core, name in enumerate(names)]
                for name, run in zip(names, runs, strict=True):
                    times[kind] += step_times(folder, name, run)
    step_s = {kind: median(found) for kind, found in times.items()}
    rates = [f"{programs[kind][0] * programs[kind][1] * batch * tokens / step_s[kind]:.0f}" for kind in times]
    gains = [f"{step_s['alone'] / step_s['ranks']:.2f}", f"{step_s['apart'] / step_s['ranks']:.2f}"]
    title = f"Weak scaling, a thread each, medians of {arguments.rounds} runs of {arguments.steps} steps"
    header = ["model, batch of a rank", "tokens/s of 1 rank", f"of {_NUM_RANKS}", f"of {_NUM_RANKS} apart"]
    header += ["2 ranks to twice 1", "2 ranks to 2 apart"]
    print_table(title, header, [[f"{size}, {batch} x {tokens}", *rates, *gains]])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--on-a-core"]:
        sys.exit(run_on_a_core(sys.argv[2:]))
    main()
