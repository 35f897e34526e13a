"""`llama31-core finetune`: a YAML file and MindRecord data in, a trained model directory out."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from statistics import mean
from typing import Any

from llama31_core.commands.interrupts import importing_mindspore
from llama31_core.run_config import load_run_config


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    text = "train a model directory on MindRecord data"
    parser = commands.add_parser("finetune", parents=[shared], help=text, description=text)
    parser.add_argument("config", type=Path, help="a YAML file, for instance configs/finetune_smollm2_135m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="put over the file's values")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line a step, and where the trained model is."""
    config = load_run_config(arguments.config, arguments.overrides)
    with importing_mindspore():  # seconds: after the file is known to be good
        from llama31_core.training.report import StepReport
        from llama31_core.training.trainer import Trainer

    trainer = Trainer(config, str(arguments.config))
    size = trainer.config.num_parameters
    print(f"{size:,} parameters, {trainer.num_steps} steps; the first one compiles", flush=True)
    if trainer.start_step:
        print(f"resumed after step {trainer.start_step}", flush=True)
    losses: list[float] = []

    def report(step: StepReport) -> None:
        losses.append(step.loss)
        print(step, flush=True)

    terminated = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    model_dir = trainer.train(report, terminated.is_set)
    if model_dir.parent.name == "checkpoints":
        print(f"stopped by SIGTERM; {model_dir} is where resume_training=True goes on", flush=True)
        return 0
    if not losses:
        print(f"saved {model_dir}; all steps had been taken before")
        return 0
    few = max(1, len(losses) // 4)
    print(f"mean loss: {mean(losses[:few]):.4f} in the first {few} steps, {mean(losses[-few:]):.4f} in the last {few}")
    print(f"saved {model_dir}")
    return 0
