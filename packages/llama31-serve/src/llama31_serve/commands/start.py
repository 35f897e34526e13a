"""`llama31-serve start`: serve one model directory until SIGTERM or SIGINT, then drain and exit 0."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama31_serve.errors import ServeError, StartError

if TYPE_CHECKING:
    from llama31_serve.server.app import Server
    from llama31_serve.server.settings import Settings
    from llama31_serve.server.tracing import Exporter, Tracing

logger = logging.getLogger(__name__)

# The engine's thread comes out of the kernels and wants the interpreter; Python's own 5 ms would be a third of a step.
_SWITCH_INTERVAL_S = 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags. None is "not said": a config.json or the default decides."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="DIR", help="model directory")
    what.add_argument("--config", type=Path, metavar="JSON", help="MindIE's config.json; the other flags go before it")
    parser.add_argument(
        "--tensor_parallel", type=int, metavar="N", help="compute over the N processes of tools/msrun_launcher.sh"
    )
    parser.add_argument("--replica", type=int, metavar="N", help="raise every port by N: one of several (see replicas)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="gRPC port; 0 takes any free one (default: 50051)")
    parser.add_argument("--model_name", help="name in GetModelInfo (default: the directory's)")
    parser.add_argument("--max_running", type=int, help="completions at once; twice as many wait (default: 64)")
    parser.add_argument("--max_per_tenant", type=int, help="completions of one tenant that run or wait (default: any)")
    parser.add_argument("--default_max_tokens", type=int, help="for requests that do not say (default: 512)")
    parser.add_argument("--drain_timeout_s", type=float, help="what running requests get after SIGTERM (default: 30)")
    parser.add_argument("--control_port", type=int, help="port of ControlService; 0 takes any free one (default: none)")
    parser.add_argument("--control_host", help="its address, and that of management and metrics (default: 127.0.0.1)")
    parser.add_argument("--http_port", type=int, help="port of HTTP at --host; 0 takes any free one (default: none)")
    parser.add_argument("--management_port", type=int, help="port of HTTP's management at --control_host")
    parser.add_argument("--metrics_port", type=int, help="port of /metrics at --control_host; management has it too")
    _add_security_arguments(parser)
    parser.add_argument("--max_seq_len", type=int, help="most tokens of prompt and completion (default: the model's)")
    parser.add_argument("--max_batch_size", type=int, help="most sequences in one step (default: the engine's)")
    parser.add_argument("--num_blocks", type=int, help="blocks of the KV cache (default: the engine's)")
    parser.add_argument("--block_size", type=int, help="tokens per block of the KV cache (default: the engine's)")
    parser.add_argument(
        "--kv_cache_dtype",
        metavar="TYPE",
        help="of the KV cache: float32, bfloat16, or auto, which follows the weights (default: auto)",
    )
    parser.add_argument("--max_loras", type=int, help="adapters that can be loaded at once (default: none)")
    parser.add_argument("--max_lora_rank", type=int, help="largest rank of an adapter (default: the engine's, 16)")
    parser.add_argument("--access_log", type=Path, metavar="FILE", help="a JSON line a request; - is standard output")
    parser.add_argument("--status_period_s", type=float, help="seconds between status lines, 0 for none (default: 5)")
    parser.add_argument("--traces", choices=("console", "otlp"), help="OpenTelemetry spans (extra: tracing)")
    parser.add_argument("--log_level", choices=("debug", "info", "warning", "error"), help="(default: warning)")


def _add_security_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls_cert", type=Path, metavar="PEM", help="serve with TLS: the certificate chain")
    parser.add_argument("--tls_key", type=Path, metavar="PEM", help="the key of --tls_cert")
    parser.add_argument("--tls_key_password", type=Path, metavar="FILE", help="file whose first line opens the key")
    parser.add_argument("--tls_client_ca", type=Path, metavar="PEM", help="demand client certificates of this CA")
    parser.add_argument("--tls_crl", type=Path, metavar="PEM", help="client certificates that are revoked")
    parser.add_argument(
        "--tls_allow_name",
        action="append",
        metavar="NAME",
        help="take only client certificates with this alternative name",
    )
    parser.add_argument("--token_file", type=Path, help="demand one of the bearer tokens in this file, one a line")
    parser.add_argument(
        "--allow_special_tokens", action="store_true", default=None, help="callers may write control tokens into text"
    )
    parser.add_argument("--allow_any_address", action="store_true", default=None, help="let --host be 0.0.0.0 or ::")


def run(arguments: argparse.Namespace) -> int:
    """Serve. Raises ServeError, or the error of the model's files, when the server can't start."""
    try:
        from llama31_serve.server import core_engine, model_files, model_text
        from llama31_serve.server.app import Server
        from llama31_serve.server.logs import set_up_log
        from llama31_serve.server.start_settings import read_settings
    except ImportError as error:
        raise StartError(f"{error}; the server needs: pip install 'llama31-serve[server]'") from error
    settings = read_settings(arguments)
    set_up_log(settings.log_level, settings.log_file, arguments.access_log)
    files = model_files.find_model_files(settings.model_dir)
    # What cannot work is said before weights load.
    engine_options, notes = core_engine.fit_caches(files.directory, files.weights, settings)
    plan = core_engine.plan_engine(files.directory, files.weights, engine_options, settings.tensor_parallel)
    device, dtype = core_engine.describe(files.directory)
    options = replace(settings.options, device_type=device, model_dtype=dtype)
    _warn(arguments.config, (*settings.notes, *notes))
    _choose_devices(settings)
    load_text = functools.partial(model_text.load_text, files.tokenizer)
    load_engine = functools.partial(core_engine.load_engine, plan, files.weights)
    servers: list[Server] = []
    if settings.tensor_parallel > 1:
        from llama31_serve.server import parallel_engine

        ranks = plan, files.weights, settings.tensor_parallel
        if not parallel_engine.is_leader(settings.tensor_parallel):
            parallel_engine.follow(*ranks)
            return 0
        load_engine = functools.partial(
            parallel_engine.load_leading_engine, *ranks, lambda problem: servers[0].lose_engine(problem)
        )
    tracing = None if arguments.traces is None else _tracing(arguments.traces, options.model_name)

    async def main() -> int:
        security = settings.security, settings.management_security
        observers = () if tracing is None else (tracing,)
        servers.append(Server(options, load_text, load_engine, *security, observers))
        return await serve_until_signal(servers[0])

    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        return asyncio.run(main())
    finally:
        if tracing is not None:
            tracing.close()


def _tracing(kind: Exporter, model_name: str) -> Tracing:
    try:
        from llama31_serve.server.tracing import Tracing, make_exporter
    except ImportError as error:
        raise StartError(f"{error}; --traces needs: pip install 'llama31-serve[tracing]'") from error
    return Tracing(model_name, make_exporter(kind))


def _warn(config: Path | None, notes: tuple[str, ...]) -> None:
    if notes:
        logger.warning("%s: without effect, or not as written: %s", config, "; ".join(notes))


def _choose_devices(settings: Settings) -> None:
    """Ascend's runtime reads this when MindSpore is imported; a CPU does not. Not run on hardware."""
    if settings.visible_devices is not None:
        devices = ",".join(str(device) for device in settings.visible_devices)
        os.environ.setdefault("ASCEND_RT_VISIBLE_DEVICES", devices)


async def serve_until_signal(server: Server) -> int:
    """Start, load, serve, and on SIGTERM, SIGINT or ControlService.Drain drain; the exit code."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.drain_requested.set)
    stop = asyncio.create_task(server.drain_requested.wait())
    broken = asyncio.create_task(server.wait_broken())
    try:
        await server.start()
        _say_where(server)
        loading = asyncio.create_task(server.load())
        await asyncio.wait((loading, stop, broken), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            print(f"Daemon start success! {server.options.model_name} is served on {server.address} (gRPC)", flush=True)
            await asyncio.wait((stop, broken), return_when=asyncio.FIRST_COMPLETED)
            if not broken.done():
                print("Draining: running requests finish, new ones are refused", flush=True)
                await server.drain()
        else:
            loading.cancel()
        failure = ServeError(server.failure) if broken.done() else None
    finally:
        stop.cancel()
        broken.cancel()
        ended = await server.close()
    if ended and failure is not None:
        raise failure
    if failure is None:
        print("Stopped", flush=True)
    else:
        print(f"llama31-serve: error: {failure}", file=sys.stderr, flush=True)
    if not ended:  # a thread deep in the model's code must not hold up the exit, nor turn it into a crash
        os._exit(0 if failure is None else 1)
    return 0


def _say_where(server: Server) -> None:
    print(f"Listening on {server.address}; loading {server.options.model_name} …", flush=True)
    if server.control is not None:
        print(f"ControlService on {server.control.address}", flush=True)
    for name, listener in server.http_listeners():
        print(f"HTTP ({name}) on {listener.url}", flush=True)
