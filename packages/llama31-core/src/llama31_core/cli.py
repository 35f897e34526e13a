"""The command line `llama31-core`: arguments in, exit code out. The commands themselves are in `commands/`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Sequence

from llama31_core import __version__
from llama31_core.commands import chat, eval, finetune, interrupts, plan, plot, predict
from llama31_core.errors import AgreedError, Llama31Error
from llama31_tokenizer.errors import Llama31Error as TokenizerSideError

_COMMANDS = (predict, chat, finetune, eval, plan, plot)
_RANK_0_FIRST_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error of input or environment, 2 on wrong usage, 130 if interrupted."""
    arguments = _build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a mark for it
    interrupts.raise_on_signals()
    try:
        exit_code: int = arguments.run(arguments)
        return exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; what is left goes nowhere
        return 0
    except (Llama31Error, TokenizerSideError, OSError) as error:
        if arguments.debug:
            raise
        _tell(error)
        return 1
    except KeyboardInterrupt:
        print(interrupts.MESSAGE, file=sys.stderr)
        return interrupts.EXIT_CODE


def _tell(error: Exception) -> None:
    """Print an error; of what all ranks of a mesh know alike, rank 0 alone. The others end after it: a launcher shows
    the words of the process that was the first to end."""
    is_rank_0 = os.environ.get("RANK_ID", "0") == "0" and os.environ.get("MS_ROLE") != "MS_SCHED"
    if isinstance(error, AgreedError) and not is_rank_0:
        print("this rank cannot begin; rank 0 says why", file=sys.stderr, flush=True)
    else:
        print(f"llama31-core: error: {error}", file=sys.stderr, flush=True)
    if not is_rank_0:
        time.sleep(_RANK_0_FIRST_S)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama31-core", description="Llama 3.1 on MindSpore.")
    parser.add_argument("--version", action="version", version=__version__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands, shared)
    return parser
