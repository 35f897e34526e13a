"""The HTTP door under load beside other servers of the same weights.

    python tools/bench/serve_peer.py --model MODEL_DIR [--hf HF_DIR] [--llama_server PROGRAM --gguf FILE]

HF_DIR is the same model as transformers reads it (`llama31-ckpt convert --reversed`), for `transformers serve`, which
needs pip install 'transformers[serving]'. PROGRAM is llama.cpp's `llama-server`, FILE the same weights for it. All
servers run at the same time and are loaded in turns: chats of real questions, greedy, streamed, so many in flight at
all times. Rates count the tokens that each server says it made; ratios are medians over the rounds. Clients share the
machine with the servers, so they read events without taking them apart. A chat whose connection a server closes before
its end (llama.cpp's does at times) is asked again and counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tokenizer_timing import print_table
from free_port import free_port

_START_LIMIT_S = 180
_TRIES = 3  # of a chat
_ANSWER_LIMIT_S = 600
_END = b"data: [DONE]"
_TEXT, _USAGE = re.compile(rb'"content": ?"[^"]'), re.compile(rb'"completion_tokens": ?(\d+)')
_SLOT_TOKENS = 1024  # of a chat, prompt and answer
_TOPICS = ("rivers", "bread", "glaciers", "maps", "bridges", "honey", "clocks", "kites", "harbours", "looms")
_QUESTIONS = [f"Tell me about {topic} in {place}." for place in ("Peru", "Norway", "Japan") for topic in _TOPICS]


class Served(NamedTuple):
    """What clients saw of a load; the time to the first token is the median of its requests."""

    tokens_per_s: float
    first_token_ms: float
    num_dropped: int  # chats that the server closed the connection on, and that were asked again


class Server(NamedTuple):
    """One that is measured: how it is started, where it says that it is ready, and what it calls the model."""

    label: str
    command: list[str]
    port: int
    ready: str
    model: str


def ours(model_dir: Path) -> Server:
    """`llama31-serve start`."""
    port = free_port()
    command = [sys.executable, "-m", "llama31_serve", "start", "--model", str(model_dir), "--port", "0"]
    command += ["--http_port", str(port), "--model_name", "bench", "--status_period_s", "0"]
    return Server("llama31", command, port, "/v1/models", "bench")


def transformers_serve(hf: Path) -> Server:
    """Hugging Face's, in bfloat16; it answers one request after the other."""
    port = free_port()
    main = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", main, "serve", str(hf), "--device", "cpu", "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    return Server("transformers serve", command, port, "/health", str(hf))


def llama_server(program: Path, gguf: Path, slots: int) -> Server:
    """llama.cpp's, with continuous batching over `slots` sequences and a thread a core, as ours."""
    port, threads = free_port(), str(len(os.sched_getaffinity(0)))
    command = [str(program), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "-np", str(slots)]
    command += ["-c", str(slots * _SLOT_TOKENS), "-t", threads, "-tb", threads]
    return Server("llama.cpp server", command, port, "/health", "bench")


@contextmanager
def running(server: Server) -> Iterator[str]:
    """A server, from when it is ready on; gives the address of its OpenAI routes."""
    address = f"http://127.0.0.1:{server.port}"
    with subprocess.Popen(server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline_s = time.monotonic() + _START_LIMIT_S
            while not _answers(f"{address}{server.ready}"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"{' '.join(server.command)}: did not start (exit code {process.poll()})")
                time.sleep(0.5)
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def load(address: str, model: str, concurrency: int, requests: int, tokens: int) -> Served:
    """Chats, `concurrency` of them at once."""
    slots, first_ms, made, dropped = asyncio.Semaphore(concurrency), [], 0, 0

    async def chat(question: str) -> None:
        nonlocal made, dropped
        async with slots:
            for _ in range(_TRIES):
                try:
                    answer = await ask(address, model, question, tokens)
                except ConnectionError as error:
                    dropped, last = dropped + 1, error
                else:
                    made += answer.tokens
                    if answer.first_token_ms is not None:
                        first_ms.append(answer.first_token_ms)
                    return
        raise ConnectionError(f"a chat was dropped {_TRIES} times, at last: {last}")

    began_s = time.perf_counter()
    await asyncio.gather(*(chat(_QUESTIONS[number % len(_QUESTIONS)]) for number in range(requests)))
    return Served(made / (time.perf_counter() - began_s), median(first_ms), dropped)


class Answer(NamedTuple):
    """One streamed chat as its client saw it."""

    tokens: int
    first_token_ms: float | None  # None if there was no text


async def ask(address: str, model: str, question: str, tokens: int) -> Answer:
    """One streamed chat over a connection of its own, whose server sends each event whole.

    Raises:
        ConnectionError: the server closed it before the end.
        SystemExit: it answered with an error.
    """
    url = urlsplit(address)
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body)
    head = f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    began_s, first_ms, answer = time.perf_counter(), None, b""
    async with asyncio.timeout(_ANSWER_LIMIT_S):
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            writer.write((head + content).encode())
            while part := await reader.read(1 << 16):
                answer += part
                if first_ms is None and _TEXT.search(answer):
                    first_ms = 1000 * (time.perf_counter() - began_s)
                if _END in answer[-len(part) - len(_END) :]:
                    break
        finally:
            writer.close()
    if answer and not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"serve_peer: error: {address} answered {answer[:500].decode(errors='replace')}")
    usage = _USAGE.findall(answer)
    if _END not in answer or not usage:
        raise ConnectionError(f"{address} closed the connection after {answer[-300:]!r}")
    return Answer(int(usage[-1]), first_ms)


def measure(servers: list[Server], concurrencies: list[int], rounds: int, tokens: int) -> list[list[str]]:
    """A row for each number of chats in flight."""
    rows = []
    with ExitStack() as stack:
        addresses = [stack.enter_context(running(server)) for server in servers]
        for server, address in zip(servers, addresses, strict=True):
            asyncio.run(load(address, server.model, 1, 2, 8))
        for concurrency in concurrencies:
            seen: list[list[Served]] = [[] for _ in servers]
            for number in range(rounds):
                for index in list(range(len(servers)))[:: -1 if number % 2 else 1]:
                    asked = load(addresses[index], servers[index].model, concurrency, max(4, 2 * concurrency), tokens)
                    seen[index].append(asyncio.run(asked))
            row = [str(concurrency), *(f"{median(s.tokens_per_s for s in found):.0f}" for found in seen)]
            for found in seen[1:]:
                pairs = zip(seen[0], found, strict=True)
                row.append(f"{median(own.tokens_per_s / theirs.tokens_per_s for own, theirs in pairs):.2f}")
            row += [f"{median(s.first_token_ms for s in found):,.0f}" for found in seen]
            rows.append([*row, *(str(sum(s.num_dropped for s in found)) for found in seen)])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--hf", type=Path, help="the same model for transformers")
    parser.add_argument("--llama_server", type=Path, help="llama.cpp's program")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48, help="the most of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if (arguments.llama_server is None) != (arguments.gguf is None):
        parser.error("--llama_server and --gguf belong together")
    servers = [ours(arguments.model)]
    if arguments.hf is not None:
        servers.append(transformers_serve(arguments.hf))
    if arguments.gguf is not None:
        servers.append(llama_server(arguments.llama_server, arguments.gguf, max(arguments.concurrency)))
    try:
        rows = measure(servers, arguments.concurrency, arguments.rounds, arguments.tokens)
    except ConnectionError as error:
        raise SystemExit(f"serve_peer: error: {error}") from None
    labels = [server.label for server in servers]
    header = ["in flight", *(f"{label} tokens/s" for label in labels), *(f"to {label}" for label in labels[1:])]
    header += [f"{label}: first token p50 ms" for label in labels] + [f"{label}: dropped chats" for label in labels]
    print_table(f"Chats of up to {arguments.tokens} tokens, medians of {arguments.rounds} rounds", header, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
