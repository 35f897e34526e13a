"""More requests than the server takes on: who runs, who waits, who is refused, and what clients do about it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from llama31_serve import AsyncClient, GenerateResult, InvalidRequestError, OverloadedError, UnavailableError
from llama31_serve.server import inference_service
from llama31_serve.server.admission import Admission
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.validation import read_generate

Serve = Any


def slow_engine(step_s: float = 0.005) -> EchoEngine:
    return EchoEngine(vocab_size=259, step_s=step_s)


async def test_running_and_queued_are_bounded_and_the_rest_is_refused_at_once(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=2) as running:
        tasks = [asyncio.create_task(running.client.generate("ab", max_tokens=4000)) for _ in range(6)]
        await running.until(lambda: running.server.admission.num_held == 6 and running.engine.num_requests == 2)
        for _ in range(20):
            with pytest.raises(OverloadedError, match="holds 6 completions of at most 6") as error:
                await running.client.generate("ab", max_tokens=1)
            assert error.value.retry_after_s is not None
            assert 0.1 <= error.value.retry_after_s <= 30
        assert (running.engine.num_requests, running.server.admission.num_refused) == (2, 20)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()


async def test_waiting_request_that_is_cancelled_gives_its_place_back(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=1) as running:
        stream = running.client.generate_stream("ab", max_tokens=4000)
        await anext(stream)
        waiting = [asyncio.create_task(running.client.generate("cd", max_tokens=2)) for _ in range(2)]
        await running.until(lambda: running.server.admission.num_held == 3)
        waiting[0].cancel()
        await running.until(lambda: running.server.admission.num_held == 2)
        stream.cancel()
        assert (await waiting[1]).text == "cd"


async def test_client_tries_again_when_the_server_says_so(serve: Serve) -> None:
    async with serve(slow_engine(), max_running=1, client_options={"max_attempts": 5}) as running:
        running.server.admission._mean_run_s = 0.1  # what the server answers in RetryInfo
        results = await asyncio.gather(*(running.client.generate("ab", max_tokens=4) for _ in range(6)))
        assert {result.text for result in results} == {"abab"}
        assert running.server.admission.num_refused > 0


async def test_client_does_not_try_again_what_is_wrong(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def read(request: Any, limits: Any) -> Any:
        calls.append(request)
        return read_generate(request, limits)

    monkeypatch.setattr(inference_service, "read_generate", read)
    async with serve(client_options={"max_attempts": 5}) as running:
        with pytest.raises(InvalidRequestError):
            await running.client.generate("ab", top_p=7)
    assert len(calls) == 1


async def test_calls_go_round_the_replicas_and_past_one_that_drains(serve: Serve) -> None:
    async with serve() as one, serve() as two:
        target = f"ipv4:{one.server.address},{two.server.address}"
        async with AsyncClient(target, timeout_s=10) as client:

            async def ask(count: int) -> list[GenerateResult]:
                return [await client.generate("ab", max_tokens=2) for _ in range(count)]

            await ask(20)
            assert one.server.requests.num_finished > 3
            assert two.server.requests.num_finished > 3
            await one.server.drain()
            before = one.server.requests.num_finished
            assert [result.text for result in await ask(10)] == ["ab"] * 10
            assert one.server.requests.num_finished == before


async def test_no_attempt_is_wasted_on_a_server_that_drains(serve: Serve) -> None:
    """Calls that are refused together are repeated together: by turns alone, every fourth would meet it twice."""
    async with serve() as one, serve() as two:
        target = f"ipv4:{one.server.address},{two.server.address}"
        async with AsyncClient(target, timeout_s=20, max_attempts=2) as client:

            async def stream() -> str:
                return "".join([chunk.text async for chunk in client.generate_stream("ab", max_tokens=2)])

            await asyncio.gather(*(client.generate("ab", max_tokens=2) for _ in range(20)))
            await one.server.drain()
            texts = await asyncio.gather(*(stream() for _ in range(40)))
            results = await asyncio.gather(*(client.generate("ab", max_tokens=2) for _ in range(40)))
            assert [*texts, *(result.text for result in results)] == ["ab"] * 80
            await two.server.drain()
            with pytest.raises(UnavailableError):
                await client.generate("ab", max_tokens=2)
            assert not await one.client.is_serving()  # of one server no health is watched: it speaks for itself
            with pytest.raises(UnavailableError, match="draining"):
                await one.client.generate("ab")


async def test_overload_tenfold(serve: Serve) -> None:
    """Every request either finishes whole or is refused; none hangs, none is lost."""
    async with serve(slow_engine(0.001), max_running=8) as running:

        async def ask(number: int) -> str:
            try:
                result = await running.client.generate("ab", max_tokens=20)
            except OverloadedError:
                return "refused"
            assert result.text == "ab" * 10
            return "answered"

        outcomes = await asyncio.gather(*(ask(number) for number in range(240)))
        answered = outcomes.count("answered")
        assert answered >= 24
        assert answered + outcomes.count("refused") == 240
        assert running.server.requests.num_finished == answered
        assert running.server.requests.num_unfinished == 0


async def test_unavailable_after_the_last_attempt() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_s=5, max_attempts=2) as client:
        with pytest.raises(UnavailableError):
            await client.generate("a")


async def test_large_request_waits_for_enough_room_and_keeps_its_turn() -> None:
    admission = Admission(max_running=3)
    with admission.reserve(2) as first:
        await first.start()
        with admission.reserve(2) as second, admission.reserve(1) as third:
            waits = [asyncio.create_task(second.start()), asyncio.create_task(third.start())]
            await asyncio.sleep(0)
            assert admission.num_running == 2  # one is free, but whoever came first gets two
            admission.leave(first)
            await asyncio.wait_for(asyncio.gather(*waits), 1)
            assert admission.num_running == 3
            admission.num_held += 2  # `first` leaves once more at the end of its block
            first.started_s = None
    assert (admission.num_running, admission.num_held) == (0, 0)


async def test_refused_place_raises_whether_it_waits_or_not() -> None:
    admission = Admission(max_running=1)
    refusal = Refusal(grpc.StatusCode.ABORTED, "no")
    with admission.reserve(1) as first:
        await first.start()
        with admission.reserve(1) as early:
            early.refuse(refusal)
            with pytest.raises(Refusal, match="no"):
                await early.start()
        with admission.reserve(1) as late:
            task = asyncio.create_task(late.start())
            await asyncio.sleep(0)
            late.refuse(refusal)
            with pytest.raises(Refusal, match="no"):
                await task
    assert (admission.num_running, admission.num_held) == (0, 0)
