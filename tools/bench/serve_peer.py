"""The HTTP door under load beside `transformers serve` over the same weights, both asked by the official openai client.

    python tools/bench/serve_peer.py --model MODEL_DIR --hf HF_DIR

HF_DIR is the same model as transformers reads it (`llama31-ckpt convert --reversed`). Both servers run at the same time
and are loaded in turns: chats of real questions, greedy, streamed, so many in flight at all times. Rates count the
tokens that each server says it made; ratios are medians over the rounds. Needs pip install 'transformers[serving]'.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tokenizer_timing import print_table
from free_port import free_port

_START_LIMIT_S = 180
_TOPICS = ("rivers", "bread", "glaciers", "maps", "bridges", "honey", "clocks", "kites", "harbours", "looms")
_QUESTIONS = [f"Tell me about {topic} in {place}." for place in ("Peru", "Norway", "Japan") for topic in _TOPICS]


class Served(NamedTuple):
    """What clients saw of a load; the time to the first token is the median of its requests."""

    tokens_per_s: float
    first_token_ms: float


@contextmanager
def running(command: list[str], port: int, route: str) -> Iterator[str]:
    """A server, from when it answers at a route on; gives the address of its OpenAI routes."""
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline_s = time.monotonic() + _START_LIMIT_S
            while not _answers(f"{address}{route}"):
                if server.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"{' '.join(command)}: did not start (exit code {server.poll()})")
                time.sleep(0.5)
            yield f"{address}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def load(address: str, model: str, concurrency: int, requests: int, tokens: int) -> Served:
    """Chats, `concurrency` of them at once."""
    slots, first_ms, made = asyncio.Semaphore(concurrency), [], 0

    async def chat(client: openai.AsyncOpenAI, question: str) -> None:
        nonlocal made
        async with slots:
            began_s, is_first = time.perf_counter(), True
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                if is_first and chunk.choices and chunk.choices[0].delta.content:
                    first_ms.append(1000 * (time.perf_counter() - began_s))
                    is_first = False
                if chunk.usage is not None:
                    made += chunk.usage.completion_tokens

    async with openai.AsyncOpenAI(base_url=address, api_key="none", timeout=600, max_retries=0) as client:
        began_s = time.perf_counter()
        await asyncio.gather(*(chat(client, _QUESTIONS[number % len(_QUESTIONS)]) for number in range(requests)))
        return Served(made / (time.perf_counter() - began_s), median(first_ms))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--hf", type=Path, required=True, help="the same model for transformers")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48, help="the most of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ports = free_port(), free_port()
    ours = [sys.executable, "-m", "llama31_serve", "start", "--model", str(arguments.model), "--port", "0"]
    ours += ["--http_port", str(ports[0]), "--model_name", "bench", "--status_period_s", "0"]
    serve = "from transformers.cli.transformers import main; main()"
    peer = [sys.executable, "-c", serve, "serve", str(arguments.hf), "--device", "cpu", "--dtype", "bfloat16"]
    peer += ["--host", "127.0.0.1", "--port", str(ports[1])]
    rows = []
    with running(ours, ports[0], "/v1/models") as first, running(peer, ports[1], "/health") as second:
        names = {first: "bench", second: str(arguments.hf)}
        for address, model in names.items():
            asyncio.run(load(address, model, 1, 2, 8))
        for concurrency in arguments.concurrency:
            seen: dict[str, list[Served]] = {address: [] for address in names}
            for number in range(arguments.rounds):
                for address in list(names)[:: -1 if number % 2 else 1]:
                    requests = max(4, 2 * concurrency)
                    seen[address].append(
                        asyncio.run(load(address, names[address], concurrency, requests, arguments.tokens))
                    )
            ratio = median(a.tokens_per_s / b.tokens_per_s for a, b in zip(*seen.values(), strict=True))
            row = [str(concurrency), *(f"{median(s.tokens_per_s for s in found):.0f}" for found in seen.values())]
            row += [f"{ratio:.2f}", *(f"{median(s.first_token_ms for s in found):,.0f}" for found in seen.values())]
            rows.append(row)
            print(" ".join(row), file=sys.stderr, flush=True)
    header = [
        "in flight",
        "llama31 tokens/s",
        "transformers serve",
        "ratio",
        "first token p50 ms",
        "transformers serve",
    ]
    print_table(f"Chats of up to {arguments.tokens} tokens, medians of {arguments.rounds} rounds", header, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
