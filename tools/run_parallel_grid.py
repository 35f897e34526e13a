"""Training on ranks against training on one process: cases in, a table of relative differences out.

    python tools/run_parallel_grid.py                    the whole grid, up to 8 ranks
    python tools/run_parallel_grid.py --ranks 4 tp2 dp2-zero1
    python tools/run_parallel_grid.py --list

For every case: the loss of the same batch, every gradient, and loss, gradient norm and weights of three AdamW steps, in
float32. A difference is relative to the largest value of its tensor. Packed sequences, labels that are not trained on,
and micro-batches of different numbers of labels are in the batch. All cases run in one start of MindSpore's ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from free_port import free_port

from llama31_core.checkpoint import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig, plan_shards

Arrays = dict[str, npt.NDArray[np.float32]]
SEQUENCES, TOKENS, STEPS = 8, 16, 3
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "dim": 32,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 2,
    "max_seq_len": 64,
}
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
TOLERANCE = 1e-5
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)
COLUMNS = ("loss", "gradients", "steps", "weights", "moments")


@dataclass(frozen=True)
class Case:
    """A mesh, micro-batches of each replica, and what the model has beside its sizes."""

    mesh: dict[str, Any]
    micro_batches: int = 1
    tied: bool = False
    ffn_dim: int = 48
    recompute: Literal["none", "select", "full"] = "none"
    objective: dict[str, float] = field(default_factory=dict)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(**self.mesh)

    @property
    def reference(self) -> str:
        """Cases with the same one have the same one-process result."""
        return f"{'tied' if self.tied else 'untied'}-{self.ffn_dim}{'-smoothed' if self.objective else ''}"


SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-3}
ZERO1, ZERO2 = {"shard_optimizer": True}, {"shard_optimizer": True, "shard_gradients": True}
SP: dict[str, Any] = {"sequence_parallel": True}
CASES: dict[str, Case] = {
    "tp2": Case({"tp": 2}),
    "tp4-kv-copies": Case({"tp": 4}),
    "tp8-kv-copies": Case({"tp": 8}),
    "tp4-whole-embedding": Case({"tp": 4, "vocab_parallel": False}),
    "tp4-tied-smoothed": Case({"tp": 4}, tied=True, objective=SMOOTHED),
    "tp2-sp": Case({"tp": 2} | SP, 2),
    "tp4-kv-copies-sp": Case({"tp": 4} | SP, recompute="select"),
    "tp2-sp-whole-embedding": Case({"tp": 2, "vocab_parallel": False} | SP),
    "tp4-sp-recompute": Case({"tp": 4} | SP, 2, recompute="full"),
    "dp2": Case({"dp": 2}, 2),
    "dp2-zero1": Case({"dp": 2} | ZERO1, 2),
    "dp4-zero2-rows-that-do-not-divide": Case({"dp": 4} | ZERO2, 2, ffn_dim=42),
    "dp2-tp2-sp-zero2": Case({"dp": 2, "tp": 2} | SP | ZERO2, 2),
    "dp4-tp2-zero1-tied": Case({"dp": 4, "tp": 2} | ZERO1, 2, tied=True),
    "pp2": Case({"pp": 2}, 4),
    "pp4": Case({"pp": 4}, 8),
    "pp2-uneven-tied": Case({"pp": 2, "offset": (1, -1)}, 2, tied=True),
    "pp2-interleave2": Case({"pp": 2, "interleave": 2}, 4),
    "pp4-tp2": Case({"pp": 4, "tp": 2}, 4),
    "pp2-interleave2-tied-tp2-sp": Case({"pp": 2, "interleave": 2, "tp": 2} | SP, 4, tied=True),
    "pp2-dp2-tp2-sp-zero1": Case({"pp": 2, "dp": 2, "tp": 2} | SP | ZERO1, 4),
    "pp2-dp4-zero2-tied": Case({"pp": 2, "dp": 4} | ZERO2, 2, tied=True),
    "pp2-dp2-zero2-tied": Case({"pp": 2, "dp": 2} | ZERO2, 2, tied=True),
    "cp2-tp2": Case({"cp": 2, "tp": 2}),
    "cp2": Case({"cp": 2}),
    "cp4": Case({"cp": 4}, 2),
    "cp8": Case({"cp": 8}),
    "cp2-tp2-sp": Case({"cp": 2, "tp": 2} | SP, 2),
    "cp4-tp2": Case({"cp": 4, "tp": 2}, recompute="full"),
    "cp2-dp2-tp2-zero2": Case({"cp": 2, "dp": 2, "tp": 2} | ZERO2, 2),
    "pp2-cp2-tp2-sp-tied": Case({"pp": 2, "cp": 2, "tp": 2} | SP, 2, tied=True, objective=SMOOTHED),
    "pp2-dp2-cp2-zero1": Case({"pp": 2, "dp": 2, "cp": 2} | ZERO1, 2),
}


def model_of(case: Case) -> ModelConfig:
    """The small model of a case."""
    return ModelConfig(**SIZES, ffn_dim=case.ffn_dim, head_dim=4, tie_word_embeddings=case.tied)


def random_values(config: ModelConfig) -> Arrays:
    """Whole weights, the same on every rank."""
    rng = np.random.default_rng(0)
    values = {}
    for name, shape in parameter_shapes(config).items():
        mean, spread = (1.0, 0.1) if len(shape) == 1 else (0.0, shape[-1] ** -0.5)
        values[name] = rng.normal(mean, spread, shape).astype(np.float32)
    return values


def build_batches(replica: int, replicas: int, micro_batches: int) -> list[Any]:
    """A replica's share of the sequences; some are packed, and some labels are not trained on."""
    from llama31_core.training.batch import Batch

    rng = np.random.default_rng(1)
    rows = rng.integers(0, SIZES["vocab_size"], (SEQUENCES, TOKENS + 1)).astype(np.int32)
    tokens, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
    labels[0, :9] = labels[3, 2:5] = labels[6] = -100
    segments = np.zeros_like(tokens)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (SEQUENCES, 1))
    for row, cut in ((1, 5), (2, 11), (4, 8), (5, 2)):
        segments[row, cut:] += 1
        positions[row, cut:] -= cut
    own = np.arange(SEQUENCES).reshape(replicas, micro_batches, -1)[replica]
    return [Batch(*(array[numbers] for array in (tokens, labels, positions, segments))) for numbers in own]


def train(step: Any, backprop: Any, weights: Any, optimizer: Any, reduction: Any, batches: list[Any]) -> dict[str, Any]:
    """Loss, gradients and three steps; tensors are this rank's."""
    count = reduction.sum_number(float(sum((batch.labels >= 0).sum() for batch in batches)))
    backprop.clear()
    loss = reduction.sum_number(backprop.accumulate(batches, 1.0 / count)) / count
    held_out = reduction.sum_number(sum(backprop.loss(batch) for batch in batches)) / count
    sums = reduction.sum_gradients(backprop.gradients)
    gradients = {name: gradient.asnumpy().copy() for name, gradient in sums.items()}  # the next steps reuse the memory
    steps = [step(batches, 1e-3) for _ in range(STEPS)]
    numbers = [loss, held_out, *(value for result in steps for value in (result.loss, result.grad_norm))]
    moments = {name: moment.asnumpy().copy() for name, moment in optimizer.moments.items()}
    for name in moments:
        if name.startswith("adam_variance."):
            moments[name] = np.sqrt(moments[name])  # in units of gradients, as errors are
    return {"numbers": numbers, "gradients": gradients, "weights": dict(weights.arrays()), "moments": moments}


def train_alone(case: Case) -> dict[str, Any]:
    """The result of one process."""
    from llama31_core.training.attention import BlockwiseAttention
    from llama31_core.training.backprop import Backprop
    from llama31_core.training.head import Objective
    from llama31_core.training.optim import AdamW
    from llama31_core.training.reduction import OneProcess
    from llama31_core.training.step import TrainStep
    from llama31_core.training.weights import TrainedWeights

    config = model_of(case)
    weights = TrainedWeights(config, BlockwiseAttention)
    weights.load(random_values(config).__getitem__)
    backprop = Backprop(weights, Objective(**case.objective), "none")
    optimizer = AdamW(weights, **ADAM)
    step = TrainStep(backprop, optimizer, max_norm=1.0)
    return train(step, backprop, weights, optimizer, OneProcess(), build_batches(0, 1, 1))


def train_on_ranks(case: Case, rank: int) -> dict[str, Any]:
    """What one rank has after the same."""
    from llama31_core.parallel.replica import build_replica
    from llama31_core.training.head import Objective

    config, parallel = model_of(case), case.parallel
    shards = plan_shards(config, parallel, rank)
    values = random_values(config)
    replica = build_replica(config, parallel, rank)
    replica.weights.load(lambda name: np.ascontiguousarray(values[name][shards[name].slices]))
    backprop = replica.backprop(Objective(**case.objective), case.recompute)
    optimizer = replica.optimizer(**ADAM)
    step = replica.step(backprop, optimizer, max_norm=1.0)
    batches = build_batches(replica.groups.at.dp, parallel.dp, case.micro_batches)
    return train(step, backprop, replica.weights, optimizer, replica.reduction, batches)


def compare(case: Case, rank: int, own: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences, each with the tensor's largest value."""
    shards = plan_shards(model_of(case), case.parallel, rank)

    def worst(kind: str, part: str) -> float:
        differences = [0.0]
        for name, value in own[kind].items():
            shard = shards[name.removeprefix("adam_mean.").removeprefix("adam_variance.")]
            want = whole[kind][name]
            difference = np.abs(value - want[getattr(shard, part)]).max()
            differences.append(float(difference / max(np.abs(want).max(), 1e-30)))
        return max(differences)

    numbers = [abs(a - b) / abs(b) for a, b in zip(own["numbers"], whole["numbers"], strict=True)]
    return {
        "loss": max(numbers[:2]),
        "gradients": worst("gradients", "optimizer_slices"),
        "steps": max(numbers[2:]),
        "weights": worst("weights", "slices"),
        "moments": worst("moments", "optimizer_slices"),
    }


def run_rank(cases: list[str], directory: Path) -> None:
    """The cases on one rank; a line of JSON each. Ranks that a mesh has no place for wait at the next case's groups."""
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    init("mccl")
    rank = get_rank()
    wholes = {path.stem: np.load(path, allow_pickle=True).item() for path in directory.glob("*.npy")}
    with (directory / f"rank_{rank}.jsonl").open("w", encoding="utf-8") as file:
        for name in cases:
            case = CASES[name]
            meet(directory, name, rank, get_group_size())
            if rank >= case.parallel.world_size:
                continue
            started = time.perf_counter()
            line: dict[str, Any] = {"case": name, "rank": rank}
            try:
                line |= compare(case, rank, train_on_ranks(case, rank), wholes[case.reference])
            except FAILURES:  # the other cases are still worth their answer
                traceback.print_exc()
                line["problem"] = traceback.format_exc().strip().splitlines()[-1]
            file.write(json.dumps(line | {"elapsed_s": time.perf_counter() - started}) + "\n")
            file.flush()


def meet(directory: Path, name: str, rank: int, ranks: int) -> None:
    """Wait for all ranks: some are idle in some cases, and in a collective MindSpore waits for half a minute only."""
    (directory / f"{name}.{rank}").touch()
    while len(list(directory.glob(f"{name}.[0-9]*"))) < ranks:
        time.sleep(0.1)


def run_grid(cases: list[str], ranks: int, log_dir: Path) -> dict[str, dict[str, float]]:
    """Start the ranks, and give for each case the worst of all ranks; what went wrong is in `log_dir`."""
    import mindspore as ms

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ms.set_context(mode=ms.GRAPH_MODE)
        for case in {CASES[case].reference: CASES[case] for case in cases}.values():
            np.save(directory / f"{case.reference}.npy", np.array(train_alone(case), dtype=object))
        started = [
            "-m", "mindspore.parallel.cluster.run", f"--worker_num={ranks}", f"--local_worker_num={ranks}",
            f"--master_port={free_port()}", f"--log_dir={log_dir}", "--join=True", "--cluster_time_out=120",
        ]  # fmt: skip
        own = [str(Path(__file__).resolve()), "--rank-of", str(directory), *cases]
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # msrun runs "python"
        subprocess.run(
            [sys.executable, *started, *own],
            env={**os.environ, "PATH": search, "OMP_NUM_THREADS": "1", "MS_CPU_COMM_OP_TIMEOUT": "120"},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {name: summarise(name, [line for line in lines if line["case"] == name]) for name in cases}


def summarise(name: str, lines: list[dict[str, Any]]) -> dict[str, float]:
    """The worst of all ranks; infinite where a rank failed or gave no answer."""
    problems = [f"{name}, rank {line['rank']}: {line['problem']}" for line in lines if "problem" in line]
    missing = CASES[name].parallel.world_size - len(lines)
    if missing:
        problems.append(f"{name}: {missing} ranks gave no answer")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    elapsed = {"elapsed_s": max((line["elapsed_s"] for line in lines), default=0.0)}
    if problems:
        return dict.fromkeys(COLUMNS, math.inf) | elapsed
    return {key: max(line[key] for line in lines) for key in COLUMNS} | elapsed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; all that fit if none")
    parser.add_argument("--ranks", type=int, default=8, help="processes to start")
    parser.add_argument("--log-dir", type=Path, default=Path("output/parallel_grid"), help="logs of the ranks")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = arguments.cases or [n for n, case in CASES.items() if case.parallel.world_size <= arguments.ranks]
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; --list names them")
    if arguments.list:
        print("\n".join(cases))
        return 0
    if arguments.rank_of is not None:
        run_rank(cases, arguments.rank_of)
        return 0
    return show(run_grid(cases, arguments.ranks, arguments.log_dir))


def show(worst: dict[str, dict[str, float]]) -> int:
    """Print the table; 1 if a difference is above the tolerance."""
    print(f"| case | ranks | {' | '.join(COLUMNS)} | seconds |")
    print("|" + "---|" * (len(COLUMNS) + 3))
    for name, row in worst.items():
        numbers = " | ".join(f"{row[column]:.0e}" for column in COLUMNS)
        print(f"| {name} | {CASES[name].parallel.world_size} | {numbers} | {row['elapsed_s']:.0f} |")
    limits = dict.fromkeys(COLUMNS, TOLERANCE) | {"moments": STEPS * TOLERANCE}  # gradients of all steps add up there
    above = [name for name, row in worst.items() if any(row[column] > limits[column] for column in COLUMNS)]
    if above:
        print(f"above {TOLERANCE} (moments {limits['moments']}): {', '.join(above)}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
