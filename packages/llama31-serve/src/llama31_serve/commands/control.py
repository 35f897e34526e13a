"""`llama31-serve control info|abort|drain`: operate a running server through its control listener."""

from __future__ import annotations

import argparse
import dataclasses
import json

import grpc

from llama31_serve.channel import Tls
from llama31_serve.commands import connection
from llama31_serve.control import ControlClient
from llama31_serve.errors import RpcError, ServeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("action", choices=("info", "abort", "drain", "adapters", "load-adapter", "unload-adapter"))
    parser.add_argument("name", nargs="?", default="", help="id of the request to abort, or name of an adapter")
    parser.add_argument("directory", nargs="?", default="", help="of the adapter to load, on the server's machine")
    connection.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what the server says: `info` as JSON, the others as one line."""
    tls, token = connection.read_tls(arguments), connection.read_token(arguments)
    try:
        _act(arguments, tls, token)
    except RpcError as error:
        if error.code not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE):
            raise
        hint = "ControlService has a listener of its own: give the address of the server's --control_port"
        raise ServeError(f"{error} ({hint})") from error
    return 0


def _act(arguments: argparse.Namespace, tls: Tls | None, token: str | None) -> None:
    with ControlClient(arguments.address, tls=tls, token=token, timeout_s=arguments.timeout_s) as client:
        if arguments.action == "info":
            print(json.dumps(dataclasses.asdict(client.server_info()), indent=2, default=str))
        elif arguments.action == "abort":
            client.abort(arguments.name)
            print(f"aborted {arguments.name}")
        elif arguments.action == "adapters":
            for adapter in client.list_adapters():
                print(f"{adapter.name}\t{adapter.source}")
        elif arguments.action == "load-adapter":
            print(f"loaded {client.load_adapter(arguments.name, arguments.directory).name}")
        elif arguments.action == "unload-adapter":
            client.unload_adapter(arguments.name)
            print(f"unloaded {arguments.name}")
        else:
            print(f"draining; {client.drain()} completions remain")
