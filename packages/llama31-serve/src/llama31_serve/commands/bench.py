"""`llama31-serve bench`: put load on a server and print what its clients see."""

from __future__ import annotations

import argparse
import asyncio

from llama31_serve.aio_client import AsyncClient
from llama31_serve.commands import connection
from llama31_serve.errors import ServeError
from llama31_serve.load import Load, at_poissons_intervals, head, measure, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    connection.add_arguments(parser)
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests in flight; a line each"
    )
    parser.add_argument("--requests", type=int, default=32, help="requests of a line (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a completion (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, help="requests a second, at Poisson's intervals (default: as soon as one ends)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: greedy)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises RpcError if the server refuses a request."""
    for name in ("requests", "tokens", *(["rate"] if arguments.rate is not None else [])):
        if not getattr(arguments, name) > 0:
            raise ServeError(f"--{name} is {getattr(arguments, name)}, allowed are numbers above 0")
    if min(arguments.concurrency) < 1:
        raise ServeError(f"--concurrency is {min(arguments.concurrency)}, allowed are numbers from 1 up")
    asyncio.run(_run(arguments))
    return 0


async def _run(arguments: argparse.Namespace) -> None:
    tls, token = connection.read_tls(arguments), connection.read_token(arguments)
    async with AsyncClient(arguments.address, tls=tls, token=token, timeout_s=arguments.timeout_s or 600) as client:
        vocab_size = (await client.model_info()).vocab_size
        load = Load(arguments.requests, arguments.tokens, vocab_size, arguments.temperature)
        print(head("in flight", "requests/s"))
        for concurrency in arguments.concurrency:
            arrivals = at_poissons_intervals(0 if arguments.rate is None else 1 / arguments.rate)
            try:
                times = await measure(client, load, arrivals, concurrency)
            except* ServeError as errors:
                first = errors.exceptions[0]
                raise first from None
            rate = load.num_requests / (times.ended_s - times.began_s)
            print(row(str(concurrency), times, f"{rate:.2f}"), flush=True)
