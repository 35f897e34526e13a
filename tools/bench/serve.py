"""What the gRPC front costs: tokens/s streamed to clients, beside the same engine alone on the same prompts.

Without --model the engine computes nothing: a figure of N tokens/s means that the front keeps up with a model of
N tokens/s, and --step_ms gives the engine the pace of a model. With --model the real engine runs, greedily and past its
end tokens. Each side has a process of its own, the clients a third one. Run it with `tools` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from llama31_serve import AsyncClient
from llama31_serve.server.app import Server
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.engine import Engine, Sampling
from llama31_serve.server.model_text import load_text
from llama31_serve.server.options import EngineOptions, ServerOptions
from model_assets import fetch

PROMPT = "The quick brown fox jumps over the lazy dog, and then it does so again, and again. "
MAX_REQUESTS_AT_ONCE = 256


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    concurrency: int
    engine_alone_per_s: float
    served_per_s: float
    tokens_per_message: float
    first_token_p50_ms: float
    first_token_p99_ms: float


@dataclass(frozen=True)
class Subject:
    """What is measured: a model directory, of which the echo engine needs the tokenizer alone."""

    model_dir: Path
    real: bool
    step_s: float

    def build_engine(self) -> Engine:
        """The engine that both sides of the comparison run."""
        if not self.real:
            return EchoEngine(vocab_size=128_256, max_seq_len=131_072, step_s=self.step_s)
        from llama31_serve.server.core_engine import load_engine, plan_engine

        return load_engine(plan_engine(self.model_dir, self.model_dir, EngineOptions()), self.model_dir)


def serve(pipe: Connection, subject: Subject) -> None:
    """Body of the server process: say the address, serve until told to stop."""

    async def run() -> None:
        options = ServerOptions(port=0, max_running=MAX_REQUESTS_AT_ONCE)
        server = Server(options, lambda: load_text(subject.model_dir), subject.build_engine)
        await server.start()
        await server.load()
        pipe.send(server.address)
        await asyncio.to_thread(pipe.recv)
        await server.drain()
        await server.close()

    asyncio.run(run())


def measure_alone(subject: Subject, concurrencies: list[int], num_tokens: int) -> list[float]:
    """Tokens/s of the engine with nothing around it, for each number of requests at once."""
    prompt_ids = load_text(subject.model_dir).tokenizer.encode(PROMPT)
    engine = subject.build_engine()
    engine.warm_up()
    speeds = []
    for concurrency in concurrencies:
        each = max(1, num_tokens // concurrency)
        began_s = time.perf_counter()
        for index in range(concurrency):
            engine.add(f"{concurrency}-{index}", prompt_ids, Sampling(max_tokens=each, temperature=0, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
        speeds.append(concurrency * each / (time.perf_counter() - began_s))
    return speeds


async def measure_served(address: str, concurrency: int, num_tokens: int, alone: float) -> Row:
    """Tokens/s of `concurrency` streams read together."""
    first_token_s: list[float] = []
    messages = 0

    async def read(client: AsyncClient) -> None:
        nonlocal messages
        began_s = time.perf_counter()
        async with client.generate_stream(PROMPT, max_tokens=num_tokens, temperature=0, ignore_eos=True) as stream:
            await anext(stream)
            first_token_s.append(time.perf_counter() - began_s)
            messages += 1
            async for _ in stream:
                messages += 1
            assert stream.result is not None
            assert stream.result.usage.completion_tokens == num_tokens

    async with AsyncClient(address, timeout_s=300) as client:
        await client.generate(PROMPT, max_tokens=8)
        began_s = time.perf_counter()
        await asyncio.gather(*(read(client) for _ in range(concurrency)))
        elapsed_s = time.perf_counter() - began_s
    total = concurrency * num_tokens
    quantiles = statistics.quantiles(first_token_s * 2, n=100)
    return Row(concurrency, alone, total / elapsed_s, total / messages, quantiles[49] * 1e3, quantiles[98] * 1e3)


def print_table(rows: list[Row]) -> None:
    """One line a concurrency; the ratio is to the engine alone."""
    print(
        f"{'streams':>7} {'engine alone':>13} {'served':>9} {'ratio':>6} {'tok/msg':>8} {'TTFT p50':>9} {'p99 ms':>7}"
    )
    for row in rows:
        print(
            f"{row.concurrency:7}  {row.engine_alone_per_s:10,.0f}/s {row.served_per_s:8,.0f}/s "
            f"{row.served_per_s / row.engine_alone_per_s:6.2f} {row.tokens_per_message:8.2f} "
            f"{row.first_token_p50_ms:9.1f} {row.first_token_p99_ms:7.1f}"
        )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens per line, over all streams")
    parser.add_argument("--step_ms", type=float, default=0.0, help="time of one step of the echo engine")
    parser.add_argument("--model", type=Path, help="model directory for the real engine")
    arguments = parser.parse_args()
    if max(arguments.concurrency) > MAX_REQUESTS_AT_ONCE:
        parser.error(f"--concurrency: at most {MAX_REQUESTS_AT_ONCE}")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model is None:
            (Path(scratch) / "tokenizer.model").symlink_to(fetch("llama3-tokenizer"))
        subject = Subject(arguments.model or Path(scratch), arguments.model is not None, arguments.step_ms / 1e3)
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            alone = pool.submit(measure_alone, subject, arguments.concurrency, arguments.tokens).result()
        ours, theirs = spawn.Pipe()
        server = spawn.Process(target=serve, args=(theirs, subject))
        server.start()
        address = ours.recv()
        rows = []
        for concurrency, speed in zip(arguments.concurrency, alone, strict=True):
            each = max(1, arguments.tokens // concurrency)
            rows.append(asyncio.run(measure_served(address, concurrency, each, speed)))
        ours.send("stop")
        server.join(60)
    print_table(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
