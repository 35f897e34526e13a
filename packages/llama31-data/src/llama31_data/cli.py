"""The command line: arguments in, exit code out. The commands themselves are in `commands/`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from llama31_data import __version__
from llama31_data.commands import convert, inspect, preprocess, stats
from llama31_data.errors import DataError

_COMMANDS = (convert, preprocess, inspect, stats)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0, or 1 after an error that was reported in one line on stderr. A usage error exits with 2.
    """
    parser = argparse.ArgumentParser(prog="llama31-data", description="Instruction data to MindRecord for Llama 3.1.")
    parser.add_argument("--version", action="version", version=f"llama31-data {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="llama31-data: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return int(arguments.run(arguments))
    except DataError as error:
        if arguments.debug:
            raise
        print(f"llama31-data: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llama31-data: error: interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stdout = None  # its reader went away, as `head` does; nothing to flush to
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
