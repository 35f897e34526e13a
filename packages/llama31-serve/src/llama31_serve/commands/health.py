"""`llama31-serve health`: a probe for supervisors and scripts."""

from __future__ import annotations

import argparse

from llama31_serve.commands import connection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    connection.add_arguments(parser)
    parser.add_argument("--wait_s", type=float, default=0.0, help="wait this long for a server that starts")


def run(arguments: argparse.Namespace) -> int:
    """Print SERVING or NOT_SERVING; exit 0 or 1."""
    with connection.connect(arguments) as client:
        if arguments.wait_s > 0:
            client.wait_until_serving(arguments.wait_s)
        serving = client.is_serving()
    print("SERVING" if serving else "NOT_SERVING")
    return 0 if serving else 1
