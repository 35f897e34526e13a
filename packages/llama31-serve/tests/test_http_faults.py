"""HTTP's callers that misbehave: they leave, do not read, do not finish their request, are killed, or send nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama31_serve import OverloadedError
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.http import call, listener

Serve = Any
STREAM = {"inputs": "abc", "parameters": {"max_new_tokens": 4000}, "stream": True}


@asynccontextmanager
async def serving(serve: Serve, step_s: float = 0.001, **options: Any) -> AsyncIterator[Any]:
    """A server that has as many files open after the block as before it."""
    engine = EchoEngine(vocab_size=259, step_s=step_s)
    async with serve(engine=engine, http_port=0, **options) as running:
        await ask(running, {"inputs": "a"})  # what is opened once is open now
        await running.client.generate("a", max_tokens=1)
        before = running.open_files()
        yield running
        await running.until(lambda: engine.num_used_blocks == 0 and running.server.admission.num_held == 0)
        await running.until(lambda: running.open_files() <= before)
        assert (await ask(running, {"inputs": "ab", "parameters": {"max_new_tokens": 3}}))["generated_text"] == "aba"


async def ask(running: Any, body: object) -> Any:
    async with httpx.AsyncClient(base_url=running.server.http.business.url, timeout=20) as client:
        return (await client.post("/generate", json=body)).json()


def connect(running: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.server.http.business.port), timeout=5)


def head_of(body: bytes, size: int | None = None) -> bytes:
    return b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (len(body) if size is None else size)


async def test_cancels_at_random_moments(serve: Serve) -> None:
    chance = random.Random(1)

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        body = {**STREAM, "stream": bool(number % 2)}
        task = asyncio.create_task(client.post("/generate", json=body))
        await asyncio.sleep(chance.random() * 0.15)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async with (
        serving(serve, max_running=16) as running,
        httpx.AsyncClient(base_url=running.server.http.business.url, timeout=20) as client,
    ):
        for first in range(0, 300, 30):
            await asyncio.gather(*(leave(client, number) for number in range(first, first + 30)))
        await running.until(lambda: running.server.admission.num_held == 0)
        assert running.server.requests.num_unfinished > 10  # how many come so far depends on the machine
        await client.aclose()


async def test_a_client_that_is_killed(serve: Serve) -> None:
    program = (
        "import sys, urllib.request\n"
        "request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {'Content-type': 'application/json'})\n"
        "answer = urllib.request.urlopen(request)\n"
        "print(answer.readline(), flush=True)\n"
        "answer.read()\n"
    )
    async with serving(serve) as running:
        command = [sys.executable, "-c", program, f"{running.server.http.business.url}/generate", json.dumps(STREAM)]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"b'data:")
        assert running.engine.num_requests == 1
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await running.until(lambda: running.engine.num_requests == 0)


async def test_a_client_that_does_not_read_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "UNREAD_TIMEOUT_S", 1.0)
    async with serving(serve, 0.0, max_running=2) as running:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(5)
        raw.connect(("127.0.0.1", running.server.http.business.port))
        for _ in range(400):  # answers that nobody takes, of 400 KB each
            body = json.dumps(STREAM).encode()
            with contextlib.suppress(OSError):
                raw.sendall(head_of(body) + body)
            if not running.server.http.business._server.server_state.connections:
                break
            await asyncio.sleep(0.02)
        await running.until(lambda: not running.server.http.business._server.server_state.connections, 15)
        raw.close()


async def test_requests_that_never_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "REQUEST_TIMEOUT_S", 0.3)
    monkeypatch.setattr(call, "BODY_TIMEOUT_S", 0.3)
    async with serving(serve) as running:
        silent, half_head, half_body, second = (connect(running) for _ in range(4))
        half_head.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n")
        half_body.sendall(head_of(b"", 100) + b'{"inputs":')
        body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}}).encode()
        second.sendall(head_of(body) + body + b"POST /gen")
        for number, raw in enumerate((silent, half_head, half_body, second)):
            received = b""
            while data := await asyncio.get_running_loop().run_in_executor(None, raw.recv, 65536):
                received += data
                if number == 2 and b"Timeout Error" in received:
                    break
            assert (b" 408 " in received) == (number == 2)
            assert (b" 200 " in received) == (number == 3)
            raw.close()


@pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_bodies_that_are_nonsense(serve: Serve, count: int) -> None:
    """Every one is answered, with 4xx or 200, on every route."""
    chance = random.Random(2)
    valid = [
        ("/generate", {"inputs": "ab", "parameters": {"max_new_tokens": 2, "stop": ["x"], "seed": 1}}),
        ("/generate", {"prompt": "ab", "max_tokens": 2, "n": 1}),
        ("/infer", {"inputs": "ab", "stream": False, "parameters": {"max_new_tokens": 1}}),
        ("/v1/completions", {"model": "model", "prompt": [97, 98], "max_tokens": 2, "logprobs": 1}),
        ("/v1/chat/completions", {"model": "model", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
        ("/v1/tokenizer", {"inputs": "ab"}),
    ]
    async with (
        serving(serve, 0.0) as running,
        httpx.AsyncClient(base_url=running.server.http.business.url, timeout=20) as client,
    ):
        seen = set()
        for number in range(count):
            path, body = valid[number % len(valid)]
            data = bytearray(json.dumps(body).encode())
            for _ in range(chance.randrange(5)):
                data[chance.randrange(len(data))] = chance.choice(b'"{}[],:0-9.etrufalsn\\ \x00\xff')
            response = await client.post(path, content=bytes(data))
            seen.add(response.status_code)
            assert response.status_code in {200, 400, 404, 422}, (data, response.text)
            json.loads(response.content)
        assert {200, 400, 422} <= seen
        await client.aclose()


async def test_bytes_that_are_no_http(serve: Serve) -> None:
    chance = random.Random(3)
    async with serving(serve) as running:
        for _ in range(200):
            with connect(running) as raw, contextlib.suppress(OSError):
                raw.sendall(chance.randbytes(chance.randrange(1, 300)))


async def test_overload_tenfold(serve: Serve) -> None:
    async with serving(serve, max_running=8) as running:
        body = {"inputs": "ab", "parameters": {"max_new_tokens": 20}}
        async with httpx.AsyncClient(base_url=running.server.http.business.url, timeout=30) as client:
            answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(240)))
        codes = [answer.status_code for answer in answers]
        assert codes.count(200) >= 24
        assert codes.count(200) + codes.count(503) == 240
        assert all(answer.json()["generated_text"] == "ab" * 10 for answer in answers if answer.status_code == 200)


@pytest.mark.slow
async def test_a_minute_of_overload_takes_no_memory(serve: Serve) -> None:
    """Ten times what is held at most, over both doors: each request is answered or refused, and memory stays flat."""
    async with serving(serve, max_running=2, status_period_s=0) as running:
        url, seen, sizes = running.server.http.business.url, [0, 0], []
        ends_s = asyncio.get_running_loop().time() + 60
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=30)) as client:

            async def over_http() -> None:
                body = {"inputs": "ab", "parameters": {"max_new_tokens": 20}}
                answer = await client.post("/generate", json=body)
                assert answer.status_code in (200, 503)
                seen[answer.status_code == 200] += 1

            async def over_grpc() -> None:
                try:
                    assert (await running.client.generate("ab", max_tokens=20)).text == "ab" * 10
                    seen[True] += 1
                except OverloadedError:
                    seen[False] += 1

            async def insist(number: int) -> None:
                while asyncio.get_running_loop().time() < ends_s:
                    await (over_http() if number % 2 else over_grpc())
                    await asyncio.sleep(0.01)

            tasks = [asyncio.create_task(insist(number)) for number in range(60)]
            while asyncio.get_running_loop().time() < ends_s:
                await asyncio.sleep(2)
                sizes.append(resident_bytes())
            await asyncio.gather(*tasks)
        assert min(seen) > 100
        early, late = max(sizes[5:10]), max(sizes[-5:])
        assert late < early * 1.05, sizes


def resident_bytes() -> int:
    """Memory of this process: server and clients."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_drain_under_load_loses_no_accepted_request(serve: Serve) -> None:
    engine = EchoEngine(vocab_size=259, step_s=0.002)
    async with serve(engine=engine, http_port=0, max_running=2) as running:
        body = {"inputs": "ab", "parameters": {"max_new_tokens": 60}}
        async with httpx.AsyncClient(base_url=running.server.http.business.url, timeout=20) as client:
            tasks = [asyncio.create_task(client.post("/generate", json={**body, "stream": n > 3})) for n in range(6)]
            await running.until(lambda: running.server.admission.num_held == 6)
            assert await running.server.drain()
            assert (await client.post("/generate", json=body)).status_code == 503
            await running.server.http.close()
            answers = await asyncio.gather(*tasks)
    assert [answer.status_code for answer in answers] == [200] * 6
    assert [answer.json()["generated_text"] for answer in answers[:4]] == ["ab" * 30] * 4
    assert all(answer.text.count('"token":') == 60 for answer in answers[4:])
