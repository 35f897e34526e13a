"""Callers that misbehave: cancels at random moments, readers that do not read, bytes that are no request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_serve import AsyncClient, CancelledError, DeadlineError
from llama31_serve.server.app import FMAAS_SERVICE, SERVICE
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.generation_request import Limits
from llama31_serve.server.job import Inbox, StepText, TextStream, Update
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.text import TextModel
from llama31_serve.server.validation import read_chat, read_generate
from llama31_serve.stubs import inference_pb2 as pb
from llama31_tokenizer.stop_strings import StopStringMatcher

Serve = Any


async def test_a_thousand_cancels_at_random_moments(serve: Serve) -> None:
    chance = random.Random(1)

    async def ask(client: AsyncClient, number: int) -> None:
        """Ends in one of five ways, after 0 to 20 ms."""
        kind, after_s = number % 5, chance.random() * 0.02
        options: Any = {"max_tokens": 4000, "n": 1 + number % 2, "stop": ["never"]}
        if kind == 0:
            task = asyncio.create_task(client.generate("abc", **options))
            await asyncio.sleep(after_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif kind == 1:
            stream = client.generate_stream("abc", **options)
            await asyncio.sleep(after_s)
            stream.cancel()
        elif kind == 2:
            async with client.generate_stream("abc", **options) as stream:
                await anext(stream)
                await asyncio.sleep(after_s)
        elif kind == 3:
            with contextlib.suppress(DeadlineError):
                await client.chat([{"role": "user", "content": "x"}], timeout_s=after_s, ignore_eos=True, **options)
        else:
            async with client.generate_stream("abc", max_tokens=1 + int(after_s * 500)) as stream:
                async for _ in stream:
                    pass
                assert stream.result is not None

    async with serve(EchoEngine(vocab_size=259, step_s=0.001), max_running=16) as running:
        await running.client.generate("abc", max_tokens=1)  # what is opened once is open now, for streams too
        assert [chunk.text async for chunk in running.client.generate_stream("abc", max_tokens=1)] == ["a"]
        before = running.open_files()
        for first in range(0, 1000, 20):  # 20 at a time, of at most 2 completions each: none is refused
            await asyncio.gather(*(ask(running.client, number) for number in range(first, first + 20)))
            await running.until(lambda: running.server.admission.num_held == 0)
        await running.until(lambda: running.engine.num_used_blocks == 0 and running.open_files() <= before)
        assert running.server.requests.num_unfinished > 100  # how many come so far depends on the machine
        assert (await running.client.generate("abc", max_tokens=4)).text == "abca"


async def test_connections_cut_without_a_word(serve: Serve) -> None:
    """The client's sockets die under running requests, as when its process is killed."""
    async with serve(EchoEngine(vocab_size=259, step_s=0.001), max_running=16) as running:
        await running.client.generate("abc", max_tokens=1)
        before = running.open_files()
        writers: list[asyncio.StreamWriter] = []
        forward = functools.partial(_forward, port=running.server.listener.port, writers=writers)
        for _ in range(10):
            proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
            port = proxy.sockets[0].getsockname()[1]
            client = AsyncClient(f"127.0.0.1:{port}", max_attempts=1)
            streams = [client.generate_stream("abc", max_tokens=4000) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            for writer in writers:
                writer.transport.abort()
            writers.clear()
            proxy.close()
            await running.until(lambda: running.engine.num_used_blocks == 0)
            await client.close()
            await proxy.wait_closed()
        await running.until(lambda: running.open_files() <= before)


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, writers: list[asyncio.StreamWriter]
) -> None:
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
    writers += [writer, up_writer]

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass

    await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))
    for each in (writer, up_writer):
        each.close()


async def test_slow_reader_costs_no_more_than_its_own_tokens(serve: Serve) -> None:
    """A reader that stops reading: the engine goes on, and what waits is merged into few messages."""
    async with serve(EchoEngine(vocab_size=259, max_seq_len=60_000), max_running=2) as running:
        async with running.client.generate_stream("abcdefgh", max_tokens=50_000) as stream:
            await anext(stream)
            quick = await running.client.generate("xy", max_tokens=4)  # nobody else waits for the slow one
            assert quick.text == "xyxy"
            await running.until(lambda: running.engine.num_requests == 0)
            messages = 0
            async for _ in stream:
                messages += 1
            assert stream.result is not None
            assert stream.result.text == "abcdefgh" * 6250
            assert stream.result.usage.completion_tokens == 50_000
        assert messages < 50_000


async def test_what_waits_for_a_reader_is_one_update_per_completion(text_model: TextModel) -> None:
    inbox = Inbox()
    streams = [TextStream(index, text_model.stream_decoder(True), StopStringMatcher(())) for index in range(3)]
    for step in range(1000):
        for stream in streams:
            inbox.put(stream.push(StepText([97], "length" if step == 999 else None)), float(step))
    updates = await inbox.take()
    assert [(u.completion_index, u.text, len(u.token_ids)) for u in updates] == [
        (i, "a" * 1000, 1000) for i in range(3)
    ]
    assert (inbox.num_tokens, inbox.first_token_s, inbox.last_token_s) == (3000, 0.0, 999.0)


async def test_a_failure_outlives_the_tokens_that_come_before_it_is_read(text_model: TextModel) -> None:
    inbox, failure = Inbox(), Refusal(grpc.StatusCode.UNAVAILABLE, "the engine is gone")
    stream = TextStream(0, text_model.stream_decoder(True), StopStringMatcher(()))
    inbox.put(Update(0, failure=failure), 0.0)
    inbox.put(stream.push(StepText([97], None)), 1.0)
    [update] = await inbox.take()
    assert update.failure is failure


def _same(data: bytes) -> bytes:
    return data


def _raw_call(channel: grpc.aio.Channel, method: MethodDescriptor) -> Callable[[bytes], Awaitable[object]]:
    """Sends bytes and reads what comes, a stream to its end."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    if not method.server_streaming:
        return functools.partial(channel.unary_unary(path, _same, _same), timeout=5)

    async def read(data: bytes) -> None:
        async for _ in channel.unary_stream(path, _same, _same)(data, timeout=5):
            pass

    return read


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_bytes_that_are_no_message(serve: Serve, count: int) -> None:
    """Raw bytes as requests, to every method: an error status each, and the server lives."""
    chance = random.Random(2)
    valid = pb.GenerateRequest(
        text=pb.TextPrompt(text="abc"), stopping=pb.StoppingParams(max_tokens=2)
    ).SerializeToString()
    async with serve() as running, grpc.aio.insecure_channel(running.server.address) as channel:
        calls = [_raw_call(channel, method) for service in (SERVICE, FMAAS_SERVICE) for method in service.methods]
        codes = set()
        for number in range(count):
            data = bytearray(valid) if number % 2 else bytearray(chance.randbytes(chance.randrange(60)))
            for _ in range(chance.randrange(4)):
                if data:
                    data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                await calls[number // 2 % len(calls)](bytes(data))
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
        # Not found is what an adapter that the bytes happen to name is.
        assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND}
        assert grpc.StatusCode.INVALID_ARGUMENT in codes
        assert (await running.client.generate("abc", max_tokens=2)).text == "ab"


async def test_bytes_that_are_no_http2(serve: Serve) -> None:
    chance = random.Random(3)
    async with serve() as running:
        for number in range(200):
            with socket.create_connection(("127.0.0.1", running.server.listener.port), timeout=5) as raw:
                preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if number % 2 else b""
                raw.sendall(preface + chance.randbytes(chance.randrange(1, 200)))
        assert (await running.client.generate("abc", max_tokens=2)).text == "ab"


LIMITS = Limits(vocab_size=259, max_seq_len=64, default_max_tokens=16, max_running=4)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=120))
def test_any_message_is_read_or_refused(data: bytes) -> None:
    reads: list[tuple[Any, Any]] = [(pb.GenerateRequest, read_generate), (pb.ChatRequest, read_chat)]
    for message_type, read in reads:
        try:
            checked = read(message_type.FromString(data), LIMITS)
        except DecodeError:
            continue
        except Refusal as refusal:
            refused = refusal
        else:
            assert 1 <= checked.n <= 4
            assert checked.max_tokens is None or 1 <= checked.max_tokens <= 64
            assert checked.temperature >= 0
            assert 0 < checked.top_p <= 1
            continue
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.violations


async def test_cancelled_stream_says_so(serve: Serve) -> None:
    async with serve(EchoEngine(vocab_size=259, step_s=0.005)) as running:
        stream = running.client.generate_stream("abc", max_tokens=4000)
        await anext(stream)
        stream.cancel()
        with pytest.raises(CancelledError) as error:
            async for _ in stream:
                pass
        assert error.value.code is grpc.StatusCode.CANCELLED


async def test_cancelled_reader_is_a_cancelled_task(serve: Serve) -> None:
    """Cancelling the task that reads is asyncio's own cancellation, not an error of the call."""
    async with serve(EchoEngine(vocab_size=259, step_s=0.05)) as running:

        async def read() -> None:
            async for _ in running.client.generate_stream("abc", max_tokens=4000):
                pass

        task = asyncio.create_task(read())
        await running.until(lambda: running.engine.num_requests == 1)
        task.cancel()
        results = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)


async def test_a_reader_that_is_cancelled_as_its_call_begins_ends_the_call(serve: Serve) -> None:
    """Just then, between the sent request and the first read, gRPC itself would let it go on."""
    async with serve(EchoEngine(vocab_size=259, step_s=0.005)) as running:
        stream = running.client.generate_stream("abc", max_tokens=4000)

        async def read() -> None:
            await anext(stream)

        task = asyncio.create_task(read())
        stream._call._preparation.add_done_callback(lambda _: task.cancel())  # before the reader waits for it
        results = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert stream._call.cancelled()
        await running.until(lambda: running.server.admission.num_held == 0)


async def test_no_request_is_refused_for_places_that_cancelled_ones_left(serve: Serve) -> None:
    async with serve(EchoEngine(vocab_size=259, step_s=0.001), max_running=1) as running:
        for _ in range(50):
            tasks = [asyncio.create_task(running.client.generate("ab", max_tokens=4000)) for _ in range(3)]
            await running.until(lambda: running.server.admission.num_held == 3)
            for task in tasks:
                task.cancel()
            await running.until(lambda: running.server.admission.num_held == 0)
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
