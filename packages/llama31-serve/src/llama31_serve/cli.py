"""The llama31-serve command: start a server, or ask one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llama31_serve import __version__
from llama31_serve.commands import ask, bench, control, describe, health, replicas, start


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="llama31-serve", description=__doc__)
    parser.add_argument("--version", action="version", version=f"llama31-serve {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_arguments, run, text in (
        ("start", start.add_arguments, start.run, "serve a model directory"),
        ("replicas", replicas.add_arguments, replicas.run, "serve it in several processes, kept going"),
        ("generate", ask.add_generate_arguments, ask.run_generate, "continue a text"),
        ("chat", ask.add_chat_arguments, ask.run_chat, "ask one question, or talk"),
        ("bench", bench.add_arguments, bench.run, "put load on a server: throughput and times"),
        ("control", control.add_arguments, control.run, "operate a server: info, abort, drain, adapters"),
        ("describe", describe.add_arguments, describe.run, "list services, methods and fields by reflection"),
        ("health", health.add_arguments, health.run, "exit 0 if the server is serving, 1 if not"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 an error at run time (one line on stderr), 2 wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        exit_code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"llama31-serve: error: {message}", file=sys.stderr)
        return 1
    return exit_code
