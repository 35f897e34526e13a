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
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llama31_serve import AsyncClient
from llama31_serve.server import core_engine
from llama31_serve.server.engine import Sampling
from llama31_serve.server.options import EngineOptions

VOCABULARY = 40_000
PROMPT_SIZES = (16, 32, 64, 128)
START_TIMEOUT_S = 300
MEAN_FIRST_GAP_S = 0.02


@dataclass(frozen=True)
class Load:
    """What is asked: `num_requests` of `num_tokens` each."""

    num_requests: int
    num_tokens: int

    def prompts(self) -> list[list[int]]:
        """Random ids, other ones for each request, so that no cache of prefixes helps."""
        draw = random.Random(self.num_requests)
        return [
            [draw.randrange(300, VOCABULARY) for _ in range(PROMPT_SIZES[index % len(PROMPT_SIZES)])]
            for index in range(self.num_requests)
        ]


@dataclass
class Times:
    """What clients saw, in seconds."""

    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    began_s: float = field(default_factory=time.perf_counter)
    ended_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.num_tokens / (self.ended_s - self.began_s)


def measure_offline(model_dir: Path, options: EngineOptions, concurrency: int, load: Load) -> float:
    """Tokens/s of the engine with `concurrency` sequences in it at all times and nothing around it."""
    engine = core_engine.load_engine(core_engine.plan_engine(model_dir, options), model_dir)
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


async def measure(address: str, load: Load, arrivals: AsyncIterator[None], concurrency: int) -> Times:
    """Send requests as they arrive, at most `concurrency` at once, and read their streams."""
    times = Times()
    room = asyncio.Semaphore(concurrency)

    async def read(client: AsyncClient, prompt_ids: Sequence[int]) -> None:
        asked_s = last_s = time.perf_counter()
        options = {"max_tokens": load.num_tokens, "temperature": 0.0, "ignore_eos": True}
        async with client.generate_stream(prompt_ids, **options) as stream:  # type: ignore[arg-type]
            async for chunk in stream:
                now_s, count = time.perf_counter(), len(chunk.token_ids)
                if count and last_s == asked_s:
                    times.first_token_s.append(now_s - asked_s)
                elif count:
                    times.between_tokens_s += [(now_s - last_s) / count] * count
                last_s = now_s if count else last_s
                times.num_tokens += count
        room.release()

    async with AsyncClient(address, timeout_s=600, max_attempts=1) as client, asyncio.TaskGroup() as group:
        for prompt_ids in load.prompts():
            await anext(arrivals)
            await room.acquire()
            group.create_task(read(client, prompt_ids))
    times.ended_s = time.perf_counter()
    return times


async def at_poissons_intervals(mean_s: float, count: int | None = None) -> AsyncIterator[None]:
    """Arrivals whose intervals are exponential; with `count`, after so many the rest come at once."""
    draw = random.Random(1)
    made = 0
    next_s = time.perf_counter()
    while True:
        if count is None or made < count:
            next_s += draw.expovariate(1 / mean_s)
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        made += 1
        yield


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


def percentiles(values: Iterable[float]) -> str:
    """p50, p95 and p99 in milliseconds."""
    found = statistics.quantiles(list(values) * 2, n=100)
    return " ".join(f"{found[index] * 1e3:8.1f}" for index in (49, 94, 98))


def print_row(name: str, times: Times, extra: str) -> None:
    """One line of a table."""
    shares = f"{percentiles(times.first_token_s)}  {percentiles(times.between_tokens_s)}"
    print(f"{name:>9} {times.tokens_per_s:9.1f} {extra:>18}  {shares}", flush=True)


def print_head(name: str, extra: str) -> None:
    """The first line of a table."""
    print(
        f"\n{name:>9} {'tokens/s':>9} {extra:>18}  {'first token ms: p50, p95, p99':>26}  from token to token: the same"
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="of the highest rate of requests")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a completion")
    parser.add_argument("--requests_per_stream", type=int, default=4)
    arguments = parser.parse_args()
    most = max(arguments.concurrency)
    options = EngineOptions(max_batch_size=most, num_blocks=most * -(-(max(PROMPT_SIZES) + arguments.tokens) // 16) + 8)
    loads = {one: Load(max(8, one * arguments.requests_per_stream), arguments.tokens) for one in arguments.concurrency}
    offline = {}
    for concurrency, load in loads.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            offline[concurrency] = pool.submit(measure_offline, arguments.model, options, concurrency, load).result()
    with running_server(arguments.model, most, options.num_blocks or 0) as address:
        print_head("in flight", "of offline")
        best = 0.0
        for concurrency, load in loads.items():
            arrivals = at_poissons_intervals(MEAN_FIRST_GAP_S, concurrency)
            times = asyncio.run(measure(address, load, arrivals, concurrency))
            best = max(best, times.tokens_per_s)
            ratio = times.tokens_per_s / offline[concurrency]
            print_row(str(concurrency), times, f"{ratio:.2f} of {offline[concurrency]:.1f}")
        print_head("share", "requests/s")
        for share in arguments.shares:
            rate = share * best / arguments.tokens
            times = asyncio.run(measure(address, loads[most], at_poissons_intervals(1 / rate), 10_000))
            print_row(f"{share:.2f}", times, f"{rate:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
