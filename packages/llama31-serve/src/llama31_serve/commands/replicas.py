"""`llama31-serve replicas`: several servers of one model, each a process, behind the clients' load balancing."""

from __future__ import annotations

import argparse
import functools
import json
import signal
from pathlib import Path
from typing import Any

from llama31_serve.commands import start
from llama31_serve.errors import StartError
from llama31_serve.supervisor import Supervisor, start_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--count", type=int, help="how many (default: modelInstanceNumber of the --config)")
    parser.add_argument(
        "start_flags",
        nargs=argparse.REMAINDER,
        metavar="-- START_FLAGS",
        help="flags of `start`; every port is raised by the number of the replica",
    )


def run(arguments: argparse.Namespace) -> int:
    """Start them and look after them until SIGTERM or SIGINT; the exit code."""
    flags = arguments.start_flags[1:] if arguments.start_flags[:1] == ["--"] else arguments.start_flags
    count = _count_in(flags) if arguments.count is None else arguments.count
    if count < 1:
        raise StartError(f"--count is {count}, allowed are numbers from 1 up")
    num_ranks = _ranks_in(flags)
    commands = [start_command(flags, replica, num_ranks) for replica in range(count)]
    supervisor = Supervisor(commands, functools.partial(print, flush=True))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    return supervisor.run()


def _ranks_in(flags: list[str]) -> int:
    """Processes of each replica: --tensor_parallel, or worldSize of the --config."""
    parser = argparse.ArgumentParser(prog="llama31-serve start")
    start.add_arguments(parser)
    asked = parser.parse_args(flags)
    if asked.tensor_parallel is not None or asked.config is None:
        return asked.tensor_parallel or 1
    try:
        [model] = json.loads(asked.config.read_text("utf-8"))["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]
        return int(model.get("worldSize", 1))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 1  # `start` says what is wrong with the file


def _count_in(flags: list[str]) -> int:
    try:
        path = Path(flags[flags.index("--config") + 1])
    except (ValueError, IndexError):
        raise StartError("how many? give --count, or a --config with BackendConfig.modelInstanceNumber") from None
    try:
        config: Any = json.loads(path.read_text("utf-8"))
        count = config["BackendConfig"].get("modelInstanceNumber", 1)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StartError(f"--config {path}: BackendConfig.modelInstanceNumber cannot be read ({error})") from error
    if not isinstance(count, int):
        raise StartError(f"--config {path}: BackendConfig.modelInstanceNumber is {count!r}, expected a number")
    return count
