"""`llama31-core plot`: the directory of a fine-tuning run in, a picture of its course out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llama31_core.errors import DatasetError
from llama31_core.training.metrics import FILE_NAME, read_metrics
from llama31_core.training.plot import plot_metrics


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    text = "draw loss, learning rate, gradient norm and speed of a fine-tuning run"
    parser = commands.add_parser("plot", parents=[shared], help=text, description=text)
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the PNG (RUN_DIR/metrics.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw it, and print where."""
    source = arguments.run_dir / FILE_NAME
    if not source.is_file():
        raise DatasetError(f"{source} does not exist; give the output_dir of a run")
    path = arguments.output or arguments.run_dir / "metrics.png"
    plot_metrics(read_metrics(source), str(arguments.run_dir), path)
    print(f"written {path}")
    return 0
