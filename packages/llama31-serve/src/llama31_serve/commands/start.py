"""`llama31-serve start`: serve one model directory until SIGTERM or SIGINT, then drain and exit 0."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from llama31_serve.errors import ServeError, StartError

if TYPE_CHECKING:
    from llama31_serve.server.app import Server
    from llama31_serve.server.listener import Security


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=50051, help="gRPC port; 0 takes any free one (default: %(default)s)"
    )
    parser.add_argument("--model_name", help="name in GetModelInfo (default: the directory's)")
    parser.add_argument(
        "--max_running",
        type=int,
        default=64,
        help="completions that run at once; twice as many wait (default: %(default)s)",
    )
    parser.add_argument(
        "--default_max_tokens", type=int, default=512, help="for requests that do not say (default: %(default)s)"
    )
    parser.add_argument(
        "--drain_timeout_s",
        type=float,
        default=30.0,
        help="what running requests get after SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--control_port", type=int, help="port of ControlService; 0 takes any free one (default: none)")
    parser.add_argument("--control_host", default="127.0.0.1", help="its address (default: %(default)s)")
    parser.add_argument("--http_port", type=int, help="port of HTTP at --host; 0 takes any free one (default: none)")
    parser.add_argument("--management_port", type=int, help="port of HTTP's management at --control_host")
    parser.add_argument("--tls_cert", type=Path, metavar="PEM", help="serve with TLS: the certificate chain")
    parser.add_argument("--tls_key", type=Path, metavar="PEM", help="the key of --tls_cert, unencrypted")
    parser.add_argument("--tls_client_ca", type=Path, metavar="PEM", help="demand client certificates of this CA")
    parser.add_argument("--token_file", type=Path, help="demand one of the bearer tokens in this file, one a line")
    parser.add_argument("--max_seq_len", type=int, help="most tokens of prompt and completion (default: the model's)")
    parser.add_argument("--max_batch_size", type=int, help="most sequences in one step (default: the engine's)")
    parser.add_argument("--num_blocks", type=int, help="blocks of the KV cache (default: the engine's)")
    parser.add_argument("--block_size", type=int, help="tokens per block of the KV cache (default: the engine's)")
    parser.add_argument(
        "--allow_special_tokens", action="store_true", help="let callers write control tokens into text prompts"
    )
    parser.add_argument("--allow_any_address", action="store_true", help="let --host be 0.0.0.0 or ::")
    parser.add_argument("--log_level", default="warning", choices=("debug", "info", "warning", "error"))


def run(arguments: argparse.Namespace) -> int:
    """Serve. Raises ServeError, or the error of the model's files, when the server can't start."""
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        from llama31_serve.server import core_engine, model_text
        from llama31_serve.server.app import Server
        from llama31_serve.server.options import EngineOptions, ServerOptions, check_model_dir
    except ImportError as error:
        raise StartError(f"{error}; the server needs: pip install 'llama31-serve[server]'") from error
    engine_options = EngineOptions(
        max_seq_len=arguments.max_seq_len,
        max_batch_size=arguments.max_batch_size,
        num_blocks=arguments.num_blocks,
        block_size=arguments.block_size,
    )
    options = ServerOptions(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.model_name or arguments.model.resolve().name,
        max_running=arguments.max_running,
        default_max_tokens=arguments.default_max_tokens,
        drain_timeout_s=arguments.drain_timeout_s,
        allow_special_tokens=arguments.allow_special_tokens,
        allow_any_address=arguments.allow_any_address,
        control_host=arguments.control_host,
        control_port=arguments.control_port,
        http_port=arguments.http_port,
        management_port=arguments.management_port,
        engine=engine_options,
    )
    security = _security(arguments)
    check_model_dir(arguments.model)
    plan = core_engine.plan_engine(arguments.model, engine_options)  # what cannot work is said before weights load
    load_text = functools.partial(model_text.load_text, arguments.model)
    load_engine = functools.partial(core_engine.load_engine, plan, arguments.model)

    async def main() -> int:
        return await serve_until_signal(Server(options, load_text, load_engine, security))

    return asyncio.run(main())


def _security(arguments: argparse.Namespace) -> Security:
    from llama31_serve.server.listener import Security
    from llama31_serve.server.tls import ServerTls
    from llama31_serve.server.token_auth import load_tokens

    tls = None
    if arguments.tls_cert is not None and arguments.tls_key is not None:
        tls = ServerTls(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    elif arguments.tls_cert is not None or arguments.tls_key is not None or arguments.tls_client_ca is not None:
        raise StartError("TLS needs both --tls_cert and --tls_key; give both")
    tokens = () if arguments.token_file is None else load_tokens(arguments.token_file)
    return Security(tls, tokens)


async def serve_until_signal(server: Server) -> int:
    """Start, load, serve, and on SIGTERM, SIGINT or ControlService.Drain drain; the exit code."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.drain_requested.set)
    stop = asyncio.create_task(server.drain_requested.wait())
    try:
        await server.start()
        print(f"Listening on {server.address}; loading {server.options.model_name} …", flush=True)
        if server.control is not None:
            print(f"ControlService on {server.control.address}", flush=True)
        for name, listener in server.http_listeners():
            print(f"HTTP ({name}) on {listener.url}", flush=True)
        loading = asyncio.create_task(server.load())
        await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            print(f"Daemon start success! {server.options.model_name} is served on {server.address} (gRPC)", flush=True)
            broken = asyncio.create_task(server.wait_broken())
            await asyncio.wait((stop, broken), return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                raise ServeError("the engine failed in several steps in a row and is given up; the log says why")
            broken.cancel()
            print("Draining: running requests finish, new ones are refused", flush=True)
            await server.drain()
        else:
            loading.cancel()
    finally:
        stop.cancel()
        ended = await server.close()
    print("Stopped", flush=True)
    if not ended:  # a thread deep in the model's code must not hold up the exit, nor turn it into a crash
        os._exit(0)
    return 0
