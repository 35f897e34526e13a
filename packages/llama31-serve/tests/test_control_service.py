"""ControlService on its own listener: info, abort, drain, and the command that calls them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from llama31_serve import ControlClient, RpcError, UnavailableError
from llama31_serve.cli import main
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.listener import Security
from llama31_serve.server.token_auth import Token
from llama31_serve.stubs import control_pb2 as pb
from llama31_serve.stubs.control_pb2_grpc import ControlServiceStub

Serve = Any


def slow_engine() -> EchoEngine:
    return EchoEngine(vocab_size=259, step_s=0.005)


async def test_server_info(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=1, control_port=0, model_name="tiny") as running:
        with ControlClient(running.server.control.address) as control:
            idle = await asyncio.to_thread(control.server_info)
            assert (idle.state, idle.model_name, idle.requests) == ("serving", "tiny", ())
            stream = running.client.generate_stream("abc", max_tokens=4000, request_id="first")
            await anext(stream)
            waiting = asyncio.create_task(running.client.generate("ab", max_tokens=2, request_id="second"))
            await running.until(lambda: running.server.admission.num_held == 2)
            busy = await asyncio.to_thread(control.server_info)
            stream.cancel()
            await waiting
            await running.until(lambda: running.server.admission.num_held == 0)
            after = await asyncio.to_thread(control.server_info)
    assert (busy.running_completions, busy.queued_completions) == (1, 1)
    assert (busy.max_running_completions, busy.max_queued_completions) == (1, 2)
    first, second = busy.requests
    assert (first.request_id, first.running, first.prompt_tokens) == ("first", True, 3)
    assert first.completion_tokens > 0
    assert (second.request_id, second.running, second.completion_tokens) == ("second", False, 0)
    assert first.age_s > second.age_s > 0
    assert (after.finished_requests, after.unfinished_requests) == (1, 1)


async def test_abort(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=1, control_port=0) as running:
        with ControlClient(running.server.control.address) as control:
            running_one = asyncio.create_task(running.client.generate("ab", max_tokens=4000, request_id="runs"))
            await running.until(lambda: running.engine.num_requests == 1)
            waiting_one = asyncio.create_task(running.client.generate("ab", max_tokens=4, request_id="waits"))
            await running.until(lambda: running.server.admission.num_held == 2)
            await asyncio.to_thread(control.abort, "waits")
            with pytest.raises(RpcError, match="ABORTED: the request was aborted before it had begun"):
                await waiting_one
            await asyncio.to_thread(control.abort, "runs")
            result = await running_one
            with pytest.raises(RpcError) as unknown:
                await asyncio.to_thread(control.abort, "runs")
    assert result.finish_reason == "aborted"
    assert result.text.startswith("abab"[: len(result.text)])
    assert len(result.completions[0].token_ids) == result.usage.completion_tokens < 4000
    assert unknown.value.code is grpc.StatusCode.NOT_FOUND


async def test_drain_asks_for_what_sigterm_asks_for(serve: Serve) -> None:
    async with serve(control_port=0) as running:
        with ControlClient(running.server.control.address) as control:
            assert await asyncio.to_thread(control.drain) == 0
        assert running.server.drain_requested.is_set()


async def test_control_is_not_where_callers_come_in(serve: Serve) -> None:
    async with serve(control_port=0) as running:
        with ControlClient(running.server.address) as control, pytest.raises(RpcError) as error:
            await asyncio.to_thread(control.drain)
        assert error.value.code is grpc.StatusCode.UNIMPLEMENTED
        assert not running.server.drain_requested.is_set()
    async with serve() as running:
        assert running.server.control is None


async def test_control_needs_the_token_too(serve: Serve) -> None:
    security = Security(tokens=(Token(b"secret"),))
    async with serve(security=security, control_port=0, client_options={"token": "secret"}) as running:
        address = running.server.control.address
        with ControlClient(address) as stranger, pytest.raises(RpcError, match="UNAUTHENTICATED"):
            await asyncio.to_thread(stranger.drain)
        with ControlClient(address, token="secret") as control:
            assert (await asyncio.to_thread(control.server_info)).state == "serving"


async def test_field_of_a_newer_proto(serve: Serve) -> None:
    request = pb.DrainRequest.FromString(b"\xa0\x06\x01")
    async with serve(control_port=0) as running:
        async with grpc.aio.insecure_channel(running.server.control.address) as channel:
            stub = ControlServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError, match="100: is a field this server does not know"):
                await stub.Drain(request)
        assert not running.server.drain_requested.is_set()


async def test_command(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    async with serve(control_port=0, model_name="tiny") as running:
        address = running.server.control.address
        assert await asyncio.to_thread(main, ["control", "info", "--address", address]) == 0
        assert json.loads(capsys.readouterr().out)["model_name"] == "tiny"
        assert await asyncio.to_thread(main, ["control", "abort", "none", "--address", address]) == 1
        assert "NOT_FOUND" in capsys.readouterr().err
        assert await asyncio.to_thread(main, ["control", "drain", "--address", address]) == 0
        assert capsys.readouterr().out == "draining; 0 completions remain\n"


async def test_requests_that_wait_when_the_drain_ends(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=1, drain_timeout_s=0.1) as running:
        tasks = [asyncio.create_task(running.client.generate("ab", max_tokens=4000)) for _ in range(3)]
        await running.until(lambda: running.server.admission.num_held == 3)
        assert not await running.server.drain()
        for task in tasks:
            with pytest.raises(UnavailableError, match="stopped before this request had finished"):
                await task
