"""Requests that do not end by themselves: cancelled, past their deadline, disconnected, aborted, drained, failed."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from llama31_serve import AsyncClient, CancelledError, DeadlineError, RpcError, UnavailableError
from llama31_serve.server.echo_engine import EchoEngine, EchoOutput
from llama31_serve.server.engine import Sampling
from llama31_serve.server.lifecycle import State

Serve = Any


def slow_engine() -> EchoEngine:
    """One token each 5 ms: a request of 4000 tokens outlives every test."""
    return EchoEngine(vocab_size=259, step_s=0.005)


async def freed_within_a_step(running: Any) -> None:
    """The server hears of it, and after that at most the step that runs ends and one more begins."""
    await running.until(lambda: running.server.admission.num_held == 0)
    steps = running.engine.num_steps
    await running.until(lambda: running.engine.num_used_blocks == 0)
    assert running.engine.num_steps <= steps + 1


async def test_cancelled_stream_frees_its_blocks(serve: Serve) -> None:
    async with serve(slow_engine()) as running:
        async with running.client.generate_stream("abc", max_tokens=4000) as stream:
            await anext(stream)
            assert running.engine.num_used_blocks > 0
            stream.cancel()
            with pytest.raises(CancelledError):
                async for _ in stream:
                    pass
        await freed_within_a_step(running)


async def test_cancelled_task_frees_its_blocks(serve: Serve) -> None:
    async with serve(slow_engine()) as running:
        task = asyncio.create_task(running.client.generate("abc", max_tokens=4000))
        await running.until(lambda: running.engine.num_requests == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await freed_within_a_step(running)


async def test_deadline(serve: Serve) -> None:
    async with serve(slow_engine()) as running:
        with pytest.raises(DeadlineError):
            await running.client.generate("abc", max_tokens=4000, timeout_s=0.1)
        with pytest.raises(DeadlineError):
            async for _ in running.client.generate_stream("abc", max_tokens=4000, timeout_s=0.1):
                pass
        await freed_within_a_step(running)


async def test_disconnect_frees_all_completions(serve: Serve) -> None:
    async with serve(slow_engine()) as running:
        client = AsyncClient(running.server.address, max_attempts=1)
        stream = client.generate_stream("abc", max_tokens=4000, n=3)
        await anext(stream)
        assert running.engine.num_requests == 3
        await client.close()
        await freed_within_a_step(running)


async def test_drain_finishes_what_was_accepted_and_refuses_the_rest(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=2) as running:
        tasks = [asyncio.create_task(running.client.generate("ab", max_tokens=40)) for _ in range(5)]  # 2 run, 3 wait
        await running.until(lambda: running.server.admission.num_held == 5 and running.engine.num_requests == 2)
        draining = asyncio.create_task(running.server.drain())
        await running.until(lambda: running.server.lifecycle.state is State.DRAINING)
        assert not await running.client.is_serving()
        with pytest.raises(UnavailableError, match="draining"):
            await running.client.generate("ab", max_tokens=1)
        assert [(await task).text for task in tasks] == ["ab" * 20] * 5
        assert await draining


async def test_drain_ends_what_takes_too_long(serve: Serve) -> None:
    async with serve(slow_engine(), drain_timeout_s=0.1) as running:
        task = asyncio.create_task(running.client.generate("ab", max_tokens=4000))
        await running.until(lambda: running.engine.num_requests == 1)
        assert not await running.server.drain()
        with pytest.raises(UnavailableError, match="stopped before this request had finished"):
            await task


class FailingEngine(EchoEngine):
    """Raises in `add` for a prompt that begins with A, and in `step` as long as a prompt that begins with S runs."""

    def add(self, request_id: str, prompt_ids: Any, sampling: Sampling) -> None:
        if prompt_ids[0] == ord("A"):
            raise RuntimeError("no")
        super().add(request_id, prompt_ids, sampling)

    def step(self) -> list[EchoOutput]:
        if any(request.prompt_ids[0] == ord("S") for request in self._requests.values()):
            raise RuntimeError("no")
        return super().step()


async def test_engine_failure_ends_the_request_and_not_the_server(serve: Serve) -> None:
    async with serve(FailingEngine(vocab_size=259, step_s=0.005)) as running:
        other = asyncio.create_task(running.client.generate("ab", max_tokens=40))
        await running.until(lambda: running.engine.num_requests == 1)
        with pytest.raises(RpcError) as refused:
            await running.client.generate("A", max_tokens=4)
        assert refused.value.code is grpc.StatusCode.INTERNAL
        assert (await other).text == "ab" * 20  # one request's failed start is nobody else's business
        for _ in range(2):
            with pytest.raises(RpcError, match="INTERNAL: the engine failed on this request"):
                await running.client.generate("S", max_tokens=4)
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
        assert await running.client.is_serving()


async def test_a_request_that_fails_in_the_engine_takes_no_other_with_it(serve: Serve) -> None:
    class OneFails(EchoEngine):
        """Ends a request whose prompt begins with F by an error of its own, as llama31_core's engine does."""

        def _next(self, request_id: str, request: Any) -> EchoOutput:
            output = super()._next(request_id, request)
            if request.prompt_ids[0] != ord("F"):
                return output
            return EchoOutput(request_id, [], "error", "logits are not numbers")

    async with serve(OneFails(vocab_size=259, step_s=0.001)) as running:
        other = asyncio.create_task(running.client.generate("ab", max_tokens=100))
        await running.until(lambda: running.engine.num_requests == 1)
        with pytest.raises(RpcError, match="INTERNAL: the engine failed on this request") as caught:
            await running.client.generate("F", max_tokens=4)
        assert "logits" not in str(caught.value)  # the reason is for the operator's log
        assert len((await other).text) == 100
        await running.until(lambda: running.engine.num_requests == 0)


async def test_engine_that_fails_in_every_step_is_given_up(serve: Serve) -> None:
    async with serve(FailingEngine(vocab_size=259)) as running:
        broken = asyncio.create_task(running.server.wait_broken())
        for _ in range(3):
            with pytest.raises(RpcError):
                await running.client.generate("S", max_tokens=4)
        await asyncio.wait_for(broken, 5)
        assert not await running.client.is_serving()
        with pytest.raises(UnavailableError, match="the engine has failed"):
            await running.client.generate("ab", max_tokens=2)


async def test_detokenizer_failure_ends_one_request(serve: Serve) -> None:
    class WrongIds(EchoEngine):
        """Makes a token that the tokenizer does not have, for prompts that begin with W."""

        def _next(self, request_id: str, request: Any) -> EchoOutput:
            output = super()._next(request_id, request)
            return EchoOutput(request_id, [9999], None) if request.prompt_ids[0] == ord("W") else output

    async with serve(WrongIds(vocab_size=259, step_s=0.001)) as running:
        other = asyncio.create_task(running.client.generate("ab", max_tokens=100))
        with pytest.raises(RpcError, match="INTERNAL"):
            await running.client.generate("W", max_tokens=4)
        assert len((await other).text) == 100
