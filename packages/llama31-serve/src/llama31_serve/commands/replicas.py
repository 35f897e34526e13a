"""`llama31-serve replicas`: several servers of one model, each a process, behind the clients' load balancing."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama31_serve.commands import start
from llama31_serve.errors import StartError
from llama31_serve.server.options import ServerOptions
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
    asked = read_start_flags(flags)
    count, num_ranks = plan_processes(arguments.count, asked)
    commands = [start_command(flags, replica, num_ranks) for replica in range(count)]
    drain_timeout_s = ServerOptions().drain_timeout_s if asked.drain_timeout_s is None else asked.drain_timeout_s
    supervisor = Supervisor(commands, say, drain_timeout_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    return supervisor.run()


def say(line: str) -> None:
    """Print a line; where nobody is left to read it, the servers go on all the same."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def read_start_flags(flags: Sequence[str]) -> argparse.Namespace:
    """As `start` reads them; SystemExit for wrong ones."""
    parser = argparse.ArgumentParser(prog="llama31-serve start")
    start.add_arguments(parser)
    return parser.parse_args(flags)


def plan_processes(count: int | None, asked: argparse.Namespace) -> tuple[int, int]:
    """How many replicas, and of how many ranks each: what the flags say, else the --config among them.

    Raises:
        StartError: nothing says how many, a number below 1, or a file that cannot be read. What else is wrong with
            the file, `start` says.
    """
    num_ranks: int | None = asked.tensor_parallel
    if asked.config is not None and (count is None or num_ranks is None):
        count_in_file, ranks_in_file = _numbers_in(asked.config)
        count = count_in_file if count is None else count
        num_ranks = ranks_in_file if num_ranks is None else num_ranks
    if count is None:
        raise StartError("how many? give --count, or a --config with BackendConfig.modelInstanceNumber")
    num_ranks = 1 if num_ranks is None else num_ranks
    for flag, number in (("--count", count), ("--tensor_parallel", num_ranks)):
        if number < 1:
            raise StartError(f"{flag} is {number}, allowed are numbers from 1 up")
    return count, num_ranks


def _numbers_in(path: Path) -> tuple[int, int]:
    """`modelInstanceNumber` and `worldSize` of MindIE's file."""
    try:
        backend: Any = json.loads(path.read_text("utf-8"))["BackendConfig"]
        [model] = backend["ModelDeployConfig"]["ModelConfig"]
        numbers = backend.get("modelInstanceNumber", 1), model.get("worldSize", 1)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        where = "BackendConfig.modelInstanceNumber and ModelDeployConfig.ModelConfig[0].worldSize"
        raise StartError(f"--config {path}: {where} cannot be read ({type(error).__name__}: {error})") from error
    for name, number in zip(("modelInstanceNumber", "worldSize"), numbers, strict=True):
        if type(number) is not int:
            raise StartError(f"--config {path}: {name} is {number!r}, expected a number")
    return numbers
