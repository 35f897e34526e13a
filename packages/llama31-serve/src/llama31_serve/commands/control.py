"""`llama31-serve control info|abort|drain`: operate a running server through its control listener."""

from __future__ import annotations

import argparse
import dataclasses
import json

from llama31_serve.commands import connection
from llama31_serve.control import ControlClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("action", choices=("info", "abort", "drain"))
    parser.add_argument("request_id", nargs="?", default="", help="of the request to abort")
    connection.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what the server says: `info` as JSON, the others as one line."""
    tls, token = connection.read_tls(arguments), connection.read_token(arguments)
    with ControlClient(arguments.address, tls=tls, token=token, timeout_s=arguments.timeout_s) as client:
        if arguments.action == "info":
            print(json.dumps(dataclasses.asdict(client.server_info()), indent=2, default=str))
        elif arguments.action == "abort":
            client.abort(arguments.request_id)
            print(f"aborted {arguments.request_id}")
        else:
            print(f"draining; {client.drain()} completions remain")
    return 0
