"""`llama31-core plan`: a run file in; memory, traffic and predicted speed out, with no device, weight or MindSpore."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.staging import staged_file
from llama31_core.errors import ConfigError
from llama31_core.plan import (
    DEVICES,
    PredictionPlan,
    PredictWorkload,
    TrainingPlan,
    TrainWorkload,
    find_device,
    plan_prediction,
    plan_training,
    report,
)
from llama31_core.plan.picture import draw_memory
from llama31_core.plan.search import search_layouts
from llama31_core.run_config import PredictConfig, load_any_config


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    text = "memory of a rank, what is sent, and the predicted speed of a run file"
    parser = commands.add_parser("plan", parents=[shared], help=text, description=text)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a YAML file that trains or predicts"
    )
    parser.add_argument("--device", default="ascend910b", metavar="NAME", help=f"{', '.join(DEVICES)} (ascend910b)")
    parser.add_argument("--devices", type=int, metavar="N", help="of --search (those of the file)")
    parser.add_argument("--search", action="store_true", help="the best layouts, and why others are dropped")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the memory of the ranks")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="put over the file's values")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 whether it fits or not."""
    device, source = find_device(arguments.device), str(arguments.config)
    if arguments.devices is not None and not arguments.search:
        raise ConfigError(f"--devices is {arguments.devices}, but it is for --search; the file has its own number")
    if arguments.devices is not None and arguments.devices < 1:
        raise ConfigError(f"--devices is {arguments.devices}, allowed is 1 or more")
    config = load_any_config(arguments.config, arguments.overrides)
    plan: TrainingPlan | PredictionPlan
    if isinstance(config, PredictConfig):
        if arguments.search:
            raise ConfigError(f"{source} predicts; --search is for files that train")
        plan = plan_prediction(PredictWorkload.of(config, source), device)
        print(report.prediction_text(plan, source))
        figures = report.prediction_json(plan)
    else:
        work = TrainWorkload.of(config, source)
        plan = plan_training(work, device)
        print(report.training_text(plan, source))
        figures = report.training_json(plan)
        if arguments.search:
            num_devices = arguments.devices or work.parallel.world_size
            result = search_layouts(work, device, num_devices)
            print("\n" + report.search_text(result, device, num_devices))
            figures["search"] = report.search_json(result)
    if arguments.json is not None:
        with staged_file(arguments.json, overwrite=True) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"written {arguments.json}")
    if arguments.picture is not None:
        draw_memory(plan, arguments.config.name, arguments.picture)
        print(f"written {arguments.picture}")
    return 0
