"""Load on a server, and what its clients see: throughput, time to the first token, time from token to token."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from llama31_serve.aio_client import AsyncClient

FIRST_ORDINARY_ID, PROMPT_SIZES = 300, (16, 32, 64, 128)


@dataclass(frozen=True)
class Load:
    """What is asked: `num_requests` of `num_tokens` each, past the end tokens."""

    num_requests: int
    num_tokens: int
    vocab_size: int
    temperature: float = 0.0

    def prompts(self) -> list[list[int]]:
        """Random ids of several lengths, other ones for each request, so that no cache of prefixes helps."""
        draw = random.Random(self.num_requests)
        first = min(FIRST_ORDINARY_ID, self.vocab_size - 1)
        return [
            [draw.randrange(first, self.vocab_size) for _ in range(PROMPT_SIZES[index % len(PROMPT_SIZES)])]
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


async def measure(client: AsyncClient, load: Load, arrivals: AsyncIterator[None], concurrency: int) -> Times:
    """Send requests as they arrive, at most `concurrency` at once, and read their streams. The first error ends it."""
    times = Times()
    room = asyncio.Semaphore(concurrency)

    async def read(prompt_ids: Sequence[int]) -> None:
        asked_s = last_s = time.perf_counter()
        stream = client.generate_stream(
            prompt_ids, max_tokens=load.num_tokens, temperature=load.temperature, ignore_eos=True
        )
        async with stream:
            async for chunk in stream:
                now_s, count = time.perf_counter(), len(chunk.token_ids)
                if count and last_s == asked_s:
                    times.first_token_s.append(now_s - asked_s)
                elif count:
                    times.between_tokens_s += [(now_s - last_s) / count] * count
                last_s = now_s if count else last_s
                times.num_tokens += count
        room.release()

    async with asyncio.TaskGroup() as group:
        for prompt_ids in load.prompts():
            await anext(arrivals)
            await room.acquire()
            group.create_task(read(prompt_ids))
    times.ended_s = time.perf_counter()
    return times


async def at_poissons_intervals(mean_s: float, count: int | None = None) -> AsyncIterator[None]:
    """Arrivals whose intervals are exponential; with `count`, after so many the rest come at once."""
    draw = random.Random(1)
    made = 0
    next_s = time.perf_counter()
    while True:
        if mean_s > 0 and (count is None or made < count):
            next_s += draw.expovariate(1 / mean_s)
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        made += 1
        yield


def head(name: str, extra: str) -> str:
    """The first line of a table of `row`s."""
    return f"{name:>9} {'tokens/s':>9} {extra:>18}  first token, ms: p50, p95, p99; from token to token: the same"


def row(name: str, times: Times, extra: str) -> str:
    """One line."""
    shares = f"{_percentiles(times.first_token_s)}  {_percentiles(times.between_tokens_s)}"
    return f"{name:>9} {times.tokens_per_s:9.1f} {extra:>18}  {shares}"


def _percentiles(values: Iterable[float]) -> str:
    known = list(values)
    if not known:
        return f"{'-':>8} {'-':>8} {'-':>8}"
    found = statistics.quantiles(known * 2, n=100)
    return " ".join(f"{found[index] * 1e3:8.1f}" for index in (49, 94, 98))
