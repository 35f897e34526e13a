"""Every benchmark in one command: a directory of tables, one JSON of everything, and a plot.

    python tools/bench/all.py OUT_DIR --model_dir MODEL_DIR --gguf FILE --data ALPACA_JSON [--only inference serve_load]

Takes about an hour on two cores. Each benchmark is a process, one after the other, since each needs the machine alone.
One that fails is said at the end and does not keep the others from running.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def commands(model_dir: str, gguf: str, data: str, out_dir: Path) -> dict[str, list[str]]:
    """Arguments of each script; those that write JSON write it beside their table."""
    return {
        "machine": ["--json", str(out_dir / "machine.json")],
        "inference": [model_dir, "--gguf", gguf, "--json", str(out_dir / "inference.json")],
        "first_token": [model_dir, "--gguf", gguf, "--json", str(out_dir / "first_token.json")],
        "phases": [model_dir, "--json", str(out_dir / "phases.json")],
        "quantization": [model_dir],
        "engine": [model_dir, "--guesses", "3", "--json", str(out_dir / "engine.json")],
        "speculation": [model_dir],
        "serve": ["--model", model_dir],
        "serve_load": ["--model", model_dir],
        "train": ["--data", data, "--model_dir", model_dir],
        "plan": [],
        "tokenizer": [],
        "data": ["--data", data],
        "ckpt": [],
    }


def run(name: str, arguments: list[str], out_dir: Path) -> dict[str, Any]:
    """Run one; its table goes to the terminal and to `<name>.txt`."""
    print(f"\n== {name}", flush=True)
    started, lines = time.monotonic(), []
    paths = os.pathsep.join(filter(None, (str(_HERE.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(_HERE / f"{name}.py"), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    (out_dir / f"{name}.txt").write_text("".join(lines))
    figures = out_dir / f"{name}.json"
    return {
        "arguments": arguments,
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "table": "".join(lines),
        "figures": json.loads(figures.read_text()) if figures.is_file() else None,
    }


def plot(inference: dict[str, Any], path: Path) -> None:
    """Tokens a second of every program, a panel for each kind of work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = inference["results"]
    works = list(next(iter(results.values())))
    figure, axes = pyplot.subplots(1, len(works), figsize=(3.2 * len(works), 4), layout="constrained", squeeze=False)
    for axis, work in zip(axes[0], works, strict=True):
        rates = [result[work]["tokens_per_s"] for result in results.values()]
        colours = ["tab:blue" if label.startswith("llama31") else "tab:gray" for label in results]
        axis.barh(list(results), rates, color=colours)
        axis.invert_yaxis()
        axis.set_title(f"{work}, tokens/s")
        axis.tick_params(labelleft=axis is axes[0][0])
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run all; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--model_dir", required=True, help="bfloat16 model directory")
    parser.add_argument("--gguf", required=True, help="a GGUF file of the same model")
    parser.add_argument("--data", required=True, help="instruction records in Alpaca's schema")
    parser.add_argument("--only", nargs="+", help="these alone")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    wanted = commands(args.model_dir, args.gguf, args.data, args.out_dir)
    if unknown := set(args.only or ()) - set(wanted):
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {', '.join(wanted)}")
    results = {name: run(name, wanted[name], args.out_dir) for name in args.only or wanted}
    (args.out_dir / "results.json").write_text(json.dumps(results, indent=1))
    if results.get("inference", {}).get("figures"):
        plot(results["inference"]["figures"], args.out_dir / "inference.png")
    failed = [name for name, result in results.items() if result["exit_code"]]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
