"""Streams that are refused before their first message: made again by the clients' own rule, and always ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from llama31_serve import AsyncClient, CancelledError, Client, OverloadedError, RpcError, UnavailableError
from llama31_serve.status_details import encode_details
from llama31_serve.stubs import inference_pb2 as pb
from llama31_serve.stubs.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server


class Refusing(InferenceServiceServicer):
    """Refuses the first `refusals` streams, answers the others "ab" in two messages, or breaks off after the first."""

    def __init__(
        self,
        refusals: int,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        retry_after_s: float | None = None,
        break_off: bool = False,
    ) -> None:
        self.refusals = refusals
        self.code = code
        self.retry_after_s = retry_after_s
        self.break_off = break_off
        self.times_s: list[float] = []

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self.times_s.append(time.monotonic())
        if len(self.times_s) <= self.refusals:
            context.set_trailing_metadata(encode_details(self.code, "no", retry_after_s=self.retry_after_s))
            context.abort(self.code, "no")
        yield pb.GenerateStreamResponse(delta=pb.Delta(text="a"))
        if self.break_off:
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
        yield pb.GenerateStreamResponse(delta=pb.Delta(text="b"))


@contextmanager
def serving(servicer: Refusing) -> Iterator[str]:
    """The address of a server with this servicer."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_InferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


Read = Callable[..., list[str]]


def read_blocking(address: str, **options: Any) -> list[str]:
    """The texts of one stream of Client."""
    with Client(address, **options) as client:
        return [chunk.text for chunk in client.generate_stream("x")]


def read_async(address: str, **options: Any) -> list[str]:
    """The texts of one stream of AsyncClient."""

    async def texts() -> AsyncIterator[str]:
        async with AsyncClient(address, **options) as client:
            async for chunk in client.generate_stream("x"):
                yield chunk.text

    async def collect() -> list[str]:
        return [text async for text in texts()]

    return asyncio.run(collect())


@pytest.fixture(params=[read_blocking, read_async])
def read(request: pytest.FixtureRequest) -> Read:
    """One stream, by both clients."""
    read: Read = request.param
    return read


def test_refused_stream_is_asked_for_again_with_growing_pauses(read: Read) -> None:
    servicer = Refusing(3)
    with serving(servicer) as address:
        assert read(address, timeout_s=20) == ["a", "b"]
    pauses_s = [after - before for before, after in zip(servicer.times_s, servicer.times_s[1:], strict=False)]
    assert len(pauses_s) == 3
    assert all(pause_s >= least_s for pause_s, least_s in zip(pauses_s, (0.16, 0.32, 0.64), strict=True))


def test_servers_own_time_is_obeyed(read: Read) -> None:
    servicer = Refusing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=0.5)
    with serving(servicer) as address:
        assert read(address, timeout_s=20) == ["a", "b"]
    assert servicer.times_s[1] - servicer.times_s[0] >= 0.5


def test_last_refusal_stands(read: Read) -> None:
    servicer = Refusing(9)
    with serving(servicer) as address, pytest.raises(UnavailableError, match="no"):
        read(address, timeout_s=20, max_attempts=2)
    assert len(servicer.times_s) == 2


def test_refusal_stands_at_once_if_the_deadline_comes_before_the_next_attempt(read: Read) -> None:
    servicer = Refusing(9, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=60)
    begin_s = time.monotonic()
    with serving(servicer) as address, pytest.raises(OverloadedError):
        read(address, timeout_s=30)
    assert time.monotonic() - begin_s < 20
    assert len(servicer.times_s) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT])
def test_other_errors_are_not_repeated(read: Read, code: grpc.StatusCode) -> None:
    servicer = Refusing(9, code)
    with serving(servicer) as address, pytest.raises(RpcError) as error:
        read(address, timeout_s=20)
    assert error.value.code is code
    assert len(servicer.times_s) == 1


def test_stream_that_has_begun_is_not_repeated(read: Read) -> None:
    servicer = Refusing(1, break_off=True)
    with serving(servicer) as address, pytest.raises(UnavailableError, match="broken off"):
        read(address, timeout_s=20)
    assert len(servicer.times_s) == 2


def test_cancel_ends_the_pause() -> None:
    servicer = Refusing(9, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=60)
    with serving(servicer) as address, Client(address) as client:
        stream = client.generate_stream("x")
        threading.Timer(0.3, stream.cancel).start()
        begin_s = time.monotonic()
        with pytest.raises(CancelledError):
            next(stream)
        assert time.monotonic() - begin_s < 20


async def test_cancel_ends_the_pause_of_an_asynchronous_stream() -> None:
    servicer = Refusing(9, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=60)
    with serving(servicer) as address:
        async with AsyncClient(address) as client:
            stream = client.generate_stream("x")
            asyncio.get_running_loop().call_later(0.3, stream.cancel)
            async with asyncio.timeout(20):
                with pytest.raises(CancelledError):
                    await anext(stream)


def test_every_stream_ends_when_the_server_refuses_and_goes() -> None:
    """By gRPC's own retries nearly all of these never returned."""
    servicer = Refusing(10_000)
    outcomes: list[grpc.StatusCode] = []

    def ask(client: Client) -> None:
        with pytest.raises(RpcError) as error:
            list(client.generate_stream("x"))
        outcomes.append(error.value.code)

    for _ in range(3):
        with serving(servicer) as address:
            client = Client(address, timeout_s=5)
            threads = [threading.Thread(target=ask, args=(client,), daemon=True) for _ in range(16)]
            for thread in threads:
                thread.start()
                time.sleep(0.01)
        end_s = time.monotonic() + 20
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads)
        client.close()
    ended_by_stop = grpc.StatusCode.CANCELLED
    assert set(outcomes) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, ended_by_stop}
    assert len(outcomes) == 48
