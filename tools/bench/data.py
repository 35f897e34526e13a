"""Speed and memory of llama31-data: end to end beside tokenisation alone and the guide's script, workers, reading.

`python tools/bench/data.py --data alpaca.json` prints the tables (without --data: the package's own sample). Records
are repeated to the counts named below. Each figure comes from a process of its own, which loads the vocabulary before
its clock starts (importing MindSpore is in the runs that write); runs that are compared take turns within each round,
and figures are medians over the rounds. `cpu` is the time of a process and its children on a core, which other work on
the machine changes little; `wall` is what a clock says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import data_steps

Result = dict[str, Any]
SEQ_LENGTH = 8192


def child(arguments: list[str]) -> Result:
    """Runs one step in a process of its own: its figures, and the peak of that process's memory, not its children's."""
    output = subprocess.run(
        [sys.executable, __file__, "--step", *arguments], check=True, capture_output=True, text=True
    )
    result: Result = json.loads(output.stdout.splitlines()[-1])
    return result


def run_step(name: str, arguments: list[str]) -> None:
    step: Callable[..., Result] = getattr(data_steps, name)
    result = step(*arguments)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **result}))


def rounds(steps: dict[str, list[str]], count: int) -> dict[str, list[Result]]:
    """Every step once in each round."""
    results: dict[str, list[Result]] = {name: [] for name in steps}
    for number in range(count):
        for name, arguments in steps.items():
            print(f"  round {number + 1} of {count}: {name}", file=sys.stderr)
            results[name].append(child(arguments))
    return results


def median(results: list[Result], figure: str, over: str | None = None) -> float:
    return float(statistics.median(result[figure] / (result[over] if over else 1) for result in results))


def ratio(results: list[Result], base: list[Result], figure: str, over: str) -> float:
    """Median of each round's ratio of a rate to the base's."""
    pairs = zip(results, base, strict=True)
    return float(statistics.median((a[figure] / a[over]) / (b[figure] / b[over]) for a, b in pairs))


def end_to_end(inputs: dict[str, Path], tokenizer: str, work: str, count: int) -> None:
    large = str(inputs["large"])
    steps = {
        "text alone: Tokenizer.encode": ["tokenise_text", large, tokenizer],
        "tokenisation alone: encode_dialog": ["tokenise", large, tokenizer],
        "end to end, packed, 1 worker": ["preprocess", large, tokenizer, work, "packed", "1"],
        "end to end, packed, 2 workers": ["preprocess", large, tokenizer, work, "packed", "2"],
    }
    found = rounds(steps, count)
    base = found["tokenisation alone: encode_dialog"]
    one = found["end to end, packed, 1 worker"]
    print(
        f"\n{base[0]['samples']:,} samples, {base[0]['tokens']:,} tokens at {SEQ_LENGTH}, medians of {count} rounds\n"
    )
    print(
        "| | wall s | cpu s | tokens/s (cpu) | to tokenisation: cpu | wall | to 1 worker (wall) |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, results in found.items():
        print(
            f"| {name} | {median(results, 'wall_s'):.1f} | {median(results, 'cpu_s'):.1f} "
            f"| {median(results, 'tokens', 'cpu_s'):,.0f} | {ratio(results, base, 'tokens', 'cpu_s'):.2f} "
            f"| {ratio(results, base, 'tokens', 'wall_s'):.2f} | {ratio(results, one, 'tokens', 'wall_s'):.2f} |"
        )
    print(f"\npacked records are {one[0]['fill_rate']:.2%} full")


def layouts(inputs: dict[str, Path], tokenizer: str, work: str, count: int) -> None:
    middle, small = str(inputs["middle"]), str(inputs["small"])
    steps = {
        "the guide's script, one record at a time": ["guide_script", small, tokenizer, work],
        "padded to 8192": ["preprocess", small, tokenizer, work, "padded", "1"],
        "length buckets, not padded to 8192": ["preprocess", middle, tokenizer, work, "buckets", "1"],
        "packed": ["preprocess", middle, tokenizer, work, "packed", "1"],
    }
    found = rounds(steps, count)
    base = found["the guide's script, one record at a time"]
    print("\n| | samples | wall s | samples/s | to the guide's script | MB written |\n|---|---|---|---|---|---|")
    for name, results in found.items():
        print(
            f"| {name} | {results[0]['samples']:,} | {median(results, 'wall_s'):.1f} "
            f"| {median(results, 'samples', 'wall_s'):,.0f} | {ratio(results, base, 'samples', 'wall_s'):.1f} "
            f"| {results[0]['size_mb']:,.0f} |"
        )


def memory(tokenizer: str, work: str) -> None:
    print("\n| synthetic records, streamed | peak of the parent, MB | wall s |\n|---|---|---|")
    for count in (10_000, 100_000, 1_000_000):
        result = child(["synthetic", str(count), tokenizer, work])
        print(f"| {count:,} | {result['peak_mb']:,.0f} | {result['wall_s']:.1f} |")


def reading(inputs: dict[str, Path], tokenizer: str, work: str, count: int) -> None:
    print("\n| loader, batches of 8 | records/s | MB/s |\n|---|---|---|")
    for layout, source in (("packed", "large"), ("padded", "small")):
        path = f"{work}/read-{layout}.mindrecord"
        child(["preprocess", str(inputs[source]), tokenizer, work, layout, "2", path])
        steps = {f"{layout}, {workers} worker{'s' * (workers > 1)}": ["load", path, str(workers)] for workers in (1, 2)}
        for name, results in rounds(steps, count).items():
            rates = [median(results, figure, "wall_s") for figure in ("records", "size_mb")]
            print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} |")


def main() -> int:
    """Prints the tables."""
    if sys.argv[1:2] == ["--step"]:
        run_step(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", help="Alpaca JSON (default: the package's own sample)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("end_to_end", "layouts", "memory", "reading"))
    options = parser.parse_args()
    from model_assets import fetch

    tokenizer = str(fetch("llama3-tokenizer"))
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(prefix="llama31-bench-") as work:
        inputs = {
            name: data_steps.repeat_records(options.data, count, Path(work) / f"{name}.jsonl")
            for name, count in (("small", 5_500), ("middle", 55_000), ("large", 1_100_000))
        }
        tables: dict[str, Callable[[], None]] = {
            "end_to_end": lambda: end_to_end(inputs, tokenizer, work, options.rounds),
            "layouts": lambda: layouts(inputs, tokenizer, work, options.rounds),
            "memory": lambda: memory(tokenizer, work),
            "reading": lambda: reading(inputs, tokenizer, work, options.rounds),
        }
        for name, table in tables.items():
            if options.only in (None, name):
                table()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
