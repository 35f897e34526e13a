"""The flags that say which server to ask, shared by the commands that ask one."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama31_serve.channel import Tls
from llama31_serve.client import Client
from llama31_serve.errors import ServeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of the server (default: %(default)s)")
    parser.add_argument("--timeout_s", type=float, help="deadline of the call")
    parser.add_argument("--tls_ca", type=Path, metavar="PEM", help="use TLS and trust this authority")
    parser.add_argument("--tls_cert", type=Path, metavar="PEM", help="client certificate for mutual TLS")
    parser.add_argument("--tls_key", type=Path, metavar="PEM", help="key of --tls_cert")
    parser.add_argument("--token_file", type=Path, help="file that holds the bearer token")


def read_tls(arguments: argparse.Namespace) -> Tls | None:
    """The TLS files, None for plaintext. Raises ServeError if they don't go together."""
    if arguments.tls_ca is None and arguments.tls_cert is None and arguments.tls_key is None:
        return None
    try:
        return Tls(ca=arguments.tls_ca, cert=arguments.tls_cert, key=arguments.tls_key)
    except ValueError as error:
        raise ServeError(str(error)) from error


def read_token(arguments: argparse.Namespace) -> str | None:
    """The bearer token, the first line of its file. Raises ServeError if there is none."""
    if arguments.token_file is None:
        return None
    try:
        lines = arguments.token_file.read_text("utf-8").split()
    except OSError as error:
        raise ServeError(f"--token_file {arguments.token_file}: {error.strerror}") from error
    if not lines:
        raise ServeError(f"--token_file {arguments.token_file}: holds no token")
    return str(lines[0])


def connect(arguments: argparse.Namespace) -> Client:
    """A client. Raises ServeError if a file can't be read."""
    tls, token = read_tls(arguments), read_token(arguments)
    try:
        return Client(arguments.address, tls=tls, token=token, timeout_s=arguments.timeout_s)
    except OSError as error:
        raise ServeError(f"{error.filename}: {error.strerror}") from error
