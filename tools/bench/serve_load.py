"""A model's server under load, over gRPC: throughput, time to the first token, time from token to token.

First table: so many requests in flight at all times (the first ones come at Poisson's intervals), beside the same
engine driven offline with as many sequences. Second: requests arrive at Poisson's intervals, at shares of the highest
rate of the first. Greedy, past the end tokens, prompts of several lengths. Server, offline engine and clients have a
process each.

    python tools/bench/serve_load.py --model DIR
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llama31_serve import AsyncClient
from llama31_serve.load import PROMPT_SIZES, Load, Times, at_poissons_intervals, head, measure, row
from llama31_serve.server import core_engine
from llama31_serve.server.engine import Sampling
from llama31_serve.server.options import EngineOptions

VOCABULARY = 40_000
MEAN_FIRST_GAP_S = 0.02


def measure_offline(model_dir: Path, options: EngineOptions, concurrency: int, load: Load) -> float:
    """Tokens/s of the engine with `concurrency` sequences in it at all times and nothing around it."""
    engine = core_engine.load_engine(core_engine.plan_engine(model_dir, model_dir, options), model_dir)
    engine.warm_up()
    waiting = list(enumerate(load.prompts()))
    running = made = 0
    began_s = time.perf_counter()
    while waiting or running:
        while waiting and running < concurrency:
            index, prompt_ids = waiting.pop(0)
            engine.add(str(index), prompt_ids, Sampling(max_tokens=load.num_tokens, temperature=0, ignore_eos=True))
            running += 1
        for output in engine.step():
            made += len(output.token_ids)
            running -= output.finish_reason is not None
    return made / (time.perf_counter() - began_s)


@contextmanager
def running_server(model_dir: Path, max_batch_size: int, num_blocks: int) -> Iterator[str]:
    """The command as operators start it; gives its address."""
    flags = ("--port", "0", "--max_batch_size", str(max_batch_size), "--num_blocks", str(num_blocks))
    start = (sys.executable, "-m", "llama31_serve", "start", "--model", str(model_dir), "--status_period_s", "0")
    with subprocess.Popen([*start, *flags], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = ""
            for line in server.stdout:
                if line.startswith("Listening on "):
                    address = line.split(";")[0].removeprefix("Listening on ")
                if line.startswith("Daemon start success!"):
                    break
            yield address
        finally:
            server.terminate()
            server.wait(60)


def measure_served(address: str, load: Load, arrivals: AsyncIterator[None], concurrency: int) -> Times:
    """The same requests through the server."""

    async def run() -> Times:
        async with AsyncClient(address, timeout_s=600, max_attempts=1) as client:
            return await measure(client, load, arrivals, concurrency)

    return asyncio.run(run())


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="of the highest rate of requests")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a completion")
    parser.add_argument("--requests_per_stream", type=int, default=4)
    arguments = parser.parse_args()
    most, each = max(arguments.concurrency), arguments.requests_per_stream
    options = EngineOptions(max_batch_size=most, num_blocks=most * -(-(max(PROMPT_SIZES) + arguments.tokens) // 16) + 8)
    loads = {one: Load(max(8, one * each), arguments.tokens, VOCABULARY) for one in arguments.concurrency}
    offline = {}
    for concurrency, load in loads.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            offline[concurrency] = pool.submit(measure_offline, arguments.model, options, concurrency, load).result()
    with running_server(arguments.model, most, options.num_blocks or 0) as address:
        print(head("in flight", "of offline"))
        best = 0.0
        for concurrency, load in loads.items():
            arrivals = at_poissons_intervals(MEAN_FIRST_GAP_S, concurrency)
            times = measure_served(address, load, arrivals, concurrency)
            best = max(best, times.tokens_per_s)
            ratio = times.tokens_per_s / offline[concurrency]
            print(row(str(concurrency), times, f"{ratio:.2f} of {offline[concurrency]:.1f}"), flush=True)
        print(f"\n{head('share', 'requests/s')}")
        for share in arguments.shares:
            rate = share * best / arguments.tokens
            times = measure_served(address, loads[most], at_poissons_intervals(1 / rate), 10_000)
            print(row(f"{share:.2f}", times, f"{rate:.2f}"), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
