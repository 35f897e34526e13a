"""Where the time of a step goes: each phase of the native model beside what the machine allows; the Python around it.

    python tools/bench/phases.py MODEL_DIR [--rounds 5] [--json OUT]

Per kind of work (decoding 1 and 16 sequences, a prompt of 512) the engine takes real steps, and says what it handed to
the model. The same model is then compiled with a clock between its phases (phases.cc) and run with the same arguments,
over the engine's own weights and cache; and once more without clocks, to see that they cost nothing. What is left of a
step is the call from Python, then scheduling and sampling. All figures are medians. MODEL_DIR may be of
float32, bfloat16, 8 or 4 bits.

Bytes are those that have to come from memory at least: weights once, and the cache's keys and values once for each
sequence. Activations are in the processor's caches. The peak is that of the best library's product of large matrices.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import measure

from llama31_core import Engine, SamplingParams
from llama31_core.config import ModelConfig
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.graph_input import graph_input, wanted_rows
from llama31_core.inference.native_llama import NativeLlama
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.kernels.native.library import SOURCES, compile_command
from llama31_core.kernels.native.threads import num_threads

PHASES = (  # in the order of phases.cc
    "embedding",
    "norms",
    "q, k and v products",
    "rotation, cache write",
    "attention",
    "output product",
    "gate and up products, SiLU",
    "down product",
    "head",
)
_WORK = {"decode 1": (1, 64), "decode 16": (16, 64), "prefill 512": (1, 512)}  # sequences, tokens of a prompt
_STEPS = 32  # that a decoding sequence takes
_REPLAYS = 16
_VOCABULARY = 40_000  # ids that every model measured here has
_CALL, _PYTHON = "call of the model", "scheduling, sampling"

Arrays = tuple[npt.NDArray[np.int32], ...]
Seconds = dict[str, list[float]]
_ids = np.random.default_rng(0)


class Recorder:
    """An engine that says how long its steps took, and the model within them, and what the model was given."""

    def __init__(self, model_dir: Path) -> None:
        options = EngineOptions(num_blocks=1024, max_batch_size=16, max_prefill_batch_size=16)
        self.engine = Engine.from_pretrained(model_dir, options=options)
        runner = self.engine._runner
        assert isinstance(runner, GraphRunner)
        if not isinstance(runner._net, NativeLlama):
            raise SystemExit("the native kernels do not run on this machine; there are no phases to measure")
        self.runner, self.net = runner, runner._net
        self._forward, self._forward_s, self._batch = runner.forward, 0.0, ForwardInput([], [], [], [])
        runner.forward = self._timed  # type: ignore[method-assign]
        self._serial = 0

    def _timed(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        start = time.perf_counter()
        logits = self._forward(batch)
        self._forward_s, self._batch = time.perf_counter() - start, batch
        return logits

    def take(self, work: str) -> tuple[float, float, Arrays]:
        """Median seconds of a step, and of the model in it, and the arguments of one in the middle."""
        batch, length = _WORK[work]
        decodes = work.startswith("decode")
        params = SamplingParams(max_tokens=_STEPS + 8, min_tokens=_STEPS + 8, temperature=0)
        names = []
        for _ in range(batch):
            self._serial += 1
            names.append(str(self._serial))
            prompt: list[int] = _ids.integers(5, _VOCABULARY, length).tolist()
            self.engine.add(names[-1], prompt, params)
        started: set[str] = set()
        while decodes and len(started) < batch:
            started |= {output.request_id for output in self.engine.step()}
        steps, forwards, arrays = [], [], Arrays()
        for number in range(_STEPS if decodes else 1):
            start = time.perf_counter()
            self.engine.step()
            steps.append(time.perf_counter() - start)
            forwards.append(self._forward_s)
            if number in (0, _STEPS // 2):
                arrays = (*graph_input(self._batch, self.runner.block_size), wanted_rows(self._batch))
        for name in names:
            self.engine.abort(name)
        return statistics.median(steps), statistics.median(forwards), arrays


class TimedModel:
    """The model with clocks, over an engine's parameters."""

    def __init__(self, net: NativeLlama, vocab_size: int, directory: Path) -> None:
        command = compile_command()
        assert command is not None  # the engine's kernels were compiled
        target, source = directory / "phases.so", Path(__file__).with_name("phases.cc")
        subprocess.run([*command, f"-I{SOURCES}", "-o", str(target), str(source)], check=True)
        self._library, self._net, self._vocab_size = ctypes.CDLL(str(target)), net, vocab_size
        self._library.Llama31SetNumThreads(num_threads())

    def phases(self, arrays: Arrays) -> list[float]:
        """Seconds of each phase of one pass."""
        return self._run("Llama31Phases", arrays)

    def whole(self, arrays: Arrays) -> float:
        """Seconds of a pass without clocks in it."""
        return self._run("Llama31Whole", arrays)[0]

    def _run(self, function: str, arrays: Arrays) -> list[float]:
        logits = np.empty((len(arrays[-1]), self._vocab_size), np.float32)
        seconds = np.zeros(len(PHASES))
        address = seconds.ctypes.data_as(ctypes.c_void_p)
        failed = self._library[function](*self._net.arguments(arrays, logits), address)
        assert not failed
        found: list[float] = seconds.tolist()
        return found


@dataclass(frozen=True)
class Cost:
    """The least that a phase has to do in all layers."""

    operations: float
    bytes: float


def _bytes_read(cell: Any) -> float:
    """Of a cell's matrix; scales and biases, if it has them, are read in half as many bits (matmul.h)."""
    numbers, *ranges = cell.get_parameters()
    return float(numbers.nbytes + sum(one.nbytes for one in ranges) / 2)


def costs(config: ModelConfig, runner: GraphRunner, arrays: Arrays) -> dict[str, Cost]:
    """Of the phases that have products in them."""
    positions_BT, wanted = arrays[1], len(arrays[-1])
    rows, layers = positions_BT.size, runner.llama.model.layers
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def product(rows: int, *matrices: list[Any]) -> Cost:
        weights = [cell for cells in matrices for cell in cells]
        shapes = [next(iter(cell.get_parameters())).shape for cell in weights]
        numbers = sum(int(shape[0]) for shape in shapes)
        return Cost(2.0 * rows * numbers, float(sum(map(_bytes_read, weights))))

    def scaled(cost: Cost, width: int) -> Cost:
        return Cost(cost.operations * width, cost.bytes)

    def cells(part: str, name: str) -> list[Any]:
        return [getattr(getattr(block, part), name) for block in layers]

    number = 2 * layers[0].attention.core.k_cache.itemsize  # keys and values
    seen, contexts = float((positions_BT + 1).sum()), float((positions_BT.max(axis=1) + 1).sum())
    head = runner.llama.lm_head or runner.llama.model.tok_embeddings
    return {
        PHASES[2]: scaled(product(rows, *(cells("attention", name) for name in ("wq", "wk", "wv"))), config.dim),
        PHASES[4]: Cost(4.0 * seen * q_width * len(layers), number * contexts * kv_width * len(layers)),
        PHASES[5]: scaled(product(rows, cells("attention", "wo")), q_width),
        PHASES[6]: scaled(product(rows, *(cells("feed_forward", name) for name in ("w1", "w3"))), config.dim),
        PHASES[7]: scaled(product(rows, cells("feed_forward", "w2")), config.ffn_dim),
        PHASES[8]: scaled(product(wanted, [head]), config.dim),
    }


def replay(recorder: Recorder, timed: TimedModel, work: str, seconds: Seconds) -> Arrays:
    """One round of a work: its seconds are added to those of each part."""
    step_s, forward_s, arrays = recorder.take(work)
    each = []
    for _ in range(_REPLAYS):
        each.append([*timed.phases(arrays), timed.whole(arrays)])
    *phases, whole_s = np.median(each, axis=0).tolist()
    parts = dict(zip(PHASES, phases, strict=True))
    parts |= {"all phases": sum(phases), "the same without clocks": whole_s}
    parts |= {_CALL: forward_s - whole_s, _PYTHON: step_s - forward_s, "the step": step_s}
    for name, value in parts.items():
        seconds.setdefault(name, []).append(value)
    return arrays


def report(work: str, seconds: Seconds, least: dict[str, Cost], limits: tuple[float, float]) -> dict[str, Any]:
    """Print a table, and give its figures."""
    bandwidth, peak = limits
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    operations, size = (sum(getattr(cost, name) for cost in least.values()) for name in ("operations", "bytes"))
    all_costs = least | dict.fromkeys(("all phases", "the same without clocks", "the step"), Cost(operations, size))
    print(f"\n| {work} | ms | of the step | GB/s | of bandwidth | GFLOP/s | of peak |\n|---|{'---|' * 6}")
    for name, value in medians.items():
        cells = ["", "", "", ""]
        if name in all_costs:
            cost = all_costs[name]
            cells = [f"{cost.bytes / value / 1e9:.1f}", f"{cost.bytes / value / bandwidth:.2f}"]
            cells += [f"{cost.operations / value / 1e9:.1f}", f"{cost.operations / value / peak:.2f}"]
        print(f"| {name} | {1e3 * value:.3f} | {value / medians['the step']:.3f} | {' | '.join(cells)} |")
    return {"seconds": medians, "least": {name: vars(cost) for name, cost in least.items()}}


def main() -> None:
    """Print a table for each kind of work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    limits = measure(num_threads())
    bandwidth = limits["read bandwidth, bytes/s"]
    peak = max(value for name, value in limits.items() if name.endswith("operations/s"))
    print(f"{bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s, {num_threads()} threads; {args.rounds} rounds")
    recorder = Recorder(args.model_dir)
    config = recorder.engine.config
    seconds: dict[str, Seconds] = {work: {} for work in _WORK}
    least = {}
    with tempfile.TemporaryDirectory() as directory:
        timed = TimedModel(recorder.net, config.vocab_size, Path(directory))
        for number in range(args.rounds + 1):
            for work in _WORK:
                kept = seconds[work] if number else {}  # the first round does not count
                least[work] = costs(config, recorder.runner, replay(recorder, timed, work, kept))
    found = {work: report(work, seconds[work], least[work], (bandwidth, peak)) for work in _WORK}
    if args.json:
        args.json.write_text(json.dumps({"limits": limits, "work": found}, indent=1))


if __name__ == "__main__":
    main()
