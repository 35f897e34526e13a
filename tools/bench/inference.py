"""Prefill and decoding of one model here, beside transformers and llama.cpp, and beside what the memory allows.

    python tools/bench/inference.py MODEL_DIR --gguf FILE [--rounds 5] [--json OUT] [--quick] [--leave_out LABEL …]

MODEL_DIR holds the bfloat16 weights; ours of 8 and 4 bits are made of them (`llama31-ckpt quantize`, to nearest). FILE
is any GGUF file of the same architecture and vocabulary, of which the description and vocabulary are taken for
llama.cpp's files; those of few bits are made by its own quantizer, as its users have them. Every contender is a process
of its own with the same number of threads. They take turns within a round, in another order each, and a ratio is the
median of the rounds' ratios.
Peers that are not installed are left out and named: `pip install torch transformers`, `pip install llama-cpp-python`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.inference_weights import quantize_gguf, write_gguf, write_hf
from bench.memory_bandwidth import read_bandwidth

from llama31_ckpt.quantize import quantize_checkpoint
from llama31_ckpt.sources import open_source
from llama31_core.config import Quantization

_WORKER = Path(__file__).with_name("inference_contenders.py")
_MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
_WORK = {
    "decode 1": ("decode", 1, 64),
    "decode 4": ("decode", 4, 64),
    "decode 16": ("decode", 16, 64),
    "prefill 128": ("prefill", 128),
    "prefill 512": ("prefill", 512),
    "prefill 2048": ("prefill", 2048),
}
# Whom a ratio compares with: ours with as many bits; bfloat16 for those not named.
_OF_SAME_BITS = {"llama.cpp Q8_0": "llama31 int8", "llama.cpp Q4_0": "llama31 int4"}
_QUICK = ("decode 1", "decode 16", "prefill 512")
Work = tuple[str | int, ...]


@dataclass
class Contender:
    """One process, and the seconds of each work by round."""

    label: str
    process: subprocess.Popen[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, work: Work) -> float:
        """Seconds of a work."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, work)) + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label} ended; see its messages above")
        return line.strip()

    def wait_until_ready(self) -> None:
        """Skip what libraries print while they load."""
        while self._line() != "ready":
            pass

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def start(label: str, name: str, model: str, threads: int, **variables: str) -> Contender:
    """A contender's process, ready; `variables` are for its environment."""
    command = [sys.executable, str(_WORKER), name, model, str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | variables
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    contender = Contender(label, process)
    contender.wait_until_ready()
    return contender


def missing_peers() -> set[str]:
    """Peers that are not installed; says so."""
    missing = {name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None}
    for name in sorted(missing):
        print(f"{name} is not installed and left out", file=sys.stderr)
    return missing


def contenders(model_dir: Path, gguf: Path, scratch: Path, threads: int, left_out: list[str]) -> list[Contender]:
    """Ours first, then each peer that is installed."""
    wanted = [("llama31 bf16", "llama31", str(model_dir))]
    for bits in (8, 4):
        quantized = scratch / f"int{bits}"
        with closing(open_source(model_dir)) as source:
            quantize_checkpoint(source, quantized, Quantization(bits=bits))
        wanted.append((f"llama31 int{bits}", "llama31", str(quantized)))
    hf = write_hf(model_dir, scratch / "hf")
    wanted += [
        (f"transformers {name}", "transformers", f"{hf}:{dtype}")
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ]
    for kind in ("F32", "BF16", "Q8_0", "Q4_0"):
        wanted.append((f"llama.cpp {kind}", "llama.cpp", str(scratch / f"{kind}.gguf")))
    if unknown := set(left_out) - {label for label, _, _ in wanted[1:]}:
        allowed = ", ".join(repr(label) for label, _, _ in wanted[1:])
        raise SystemExit(f"--leave_out {', '.join(sorted(unknown))}: allowed are {allowed}")
    missing = missing_peers()
    taken = [(label, name, model) for label, name, model in wanted if name not in missing and label not in left_out]
    for label, name, model in taken:
        if name == "llama.cpp":
            _write_for_llama_cpp(hf, gguf, label.split()[-1], Path(model))
    return [start(label, name, model, threads) for label, name, model in taken]


def _write_for_llama_cpp(hf: Path, like: Path, kind: str, target: Path) -> None:
    whole = target if kind == "F32" else target.with_name("BF16.gguf")
    if not whole.exists():
        write_gguf(hf, like, whole.stem, whole)
    if whole != target:
        quantize_gguf(whole, kind, target)


def measure(all_contenders: list[Contender], names: list[str], rounds: int) -> None:
    """Fill in the seconds: a first round that does not count, then the others."""
    for number in range(rounds + 1):
        for name in names:
            for contender in random.sample(all_contenders, len(all_contenders)):
                seconds = contender.run(_WORK[name])
                if number:
                    contender.seconds.setdefault(name, []).append(seconds)
        print(f"round {number} of {rounds} done", file=sys.stderr)


def tokens_of(work: Work) -> int:
    """How many tokens a work is."""
    return int(work[-1]) * (int(work[1]) if work[0] == "decode" else 1)


def report(all_contenders: list[Contender], names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Tokens/s and how many times faster ours is, printed as a table."""
    ours = {contender.label: contender for contender in all_contenders if contender.label.startswith("llama31")}
    result: dict[str, dict[str, dict[str, float]]] = {}
    print(f"\n| tokens/s (ours of the same bits / theirs) | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for contender in all_contenders:
        cells = []
        for name in names:
            rate = tokens_of(_WORK[name]) / statistics.median(contender.seconds[name])
            own = ours.get(_OF_SAME_BITS.get(contender.label, ""), ours["llama31 bf16"])
            pairs = zip(contender.seconds[name], own.seconds[name], strict=True)
            ratio = statistics.median(theirs / mine for theirs, mine in pairs)
            result.setdefault(contender.label, {})[name] = {"tokens_per_s": rate, "ours_to_it": ratio}
            cells.append(f"{rate:,.0f}" + ("" if contender.label in ours else f" ({ratio:.2f}x)"))
        print(f"| {contender.label} | {' | '.join(cells)} |")
    return result


def contender_options(description: str | None) -> argparse.ArgumentParser:
    """What every command over these processes is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, help="bfloat16 model directory")
    parser.add_argument("--gguf", type=Path, required=True, help="a GGUF file of the same architecture and vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    return parser


def main() -> None:
    """Measure and print."""
    parser = contender_options(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(_QUICK)}")
    parser.add_argument("--leave_out", nargs="+", metavar="LABEL", default=[], help="contenders to do without")
    args = parser.parse_args()
    names = list(_QUICK if args.quick else _WORK)
    weight_bytes = (args.model_dir / "model.safetensors").stat().st_size
    with tempfile.TemporaryDirectory() as scratch:
        before = read_bandwidth(args.threads)
        all_contenders = contenders(args.model_dir, args.gguf, Path(scratch), args.threads, args.leave_out)
        try:
            measure(all_contenders, names, args.rounds)
        finally:
            for contender in all_contenders:
                contender.stop()
    result = report(all_contenders, names)
    bandwidth = max(before, read_bandwidth(args.threads))
    step_s = 1 / result["llama31 bf16"]["decode 1"]["tokens_per_s"]
    fraction = weight_bytes / step_s / bandwidth
    print(f"\nRead bandwidth {bandwidth / 1e9:.1f} GB/s, weights {weight_bytes / 1e9:.3f} GB: decode 1 reads them at")
    print(f"{fraction:.2f} of it.")
    if args.json:
        args.json.write_text(
            json.dumps({"bandwidth": bandwidth, "weight_bytes": weight_bytes, "results": result}, indent=1)
        )


if __name__ == "__main__":
    main()
