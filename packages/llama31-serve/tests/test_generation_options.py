"""The fields beyond the plain ones: log-probabilities, penalties, priorities, adapters, structured output, tenants."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from openai import AsyncOpenAI

from llama31_serve import ControlClient, InvalidRequestError, OverloadedError, RpcError, TokenLogprobs
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.listener import Security
from llama31_serve.server.token_auth import load_tokens

Serve = Any


class Recording(EchoEngine):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__(vocab_size=259)
        self.asked: list[Any] = []

    def add(self, request_id: str, prompt_ids: Any, sampling: Any) -> None:
        self.asked.append(sampling)
        super().add(request_id, prompt_ids, sampling)


async def test_logprobs_streamed_or_not(serve: Serve) -> None:
    async with serve() as running:
        options: Any = {"max_tokens": 3, "logprobs": 2, "prompt_logprobs": 1, "temperature": 0}
        whole = await running.client.generate("ab", **options)
        async with running.client.generate_stream("ab", **options) as stream:
            chunks = [chunk async for chunk in stream]
    a, b = (TokenLogprobs(token, 0.0, ((token, 0.0), (token + 1, -1.0))) for token in b"ab")
    assert whole.completions[0].logprobs == (a, b, a)
    assert whole.prompt_logprobs == (TokenLogprobs(0, None, ()), TokenLogprobs(98, 0.0, ((98, 0.0),)))
    assert stream.result.completions == whole.completions
    assert stream.result.prompt_logprobs == whole.prompt_logprobs
    assert tuple(report for chunk in chunks for report in chunk.logprobs) == (a, b, a)


async def test_logprobs_end_where_the_stop_string_does(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate("abcd", max_tokens=40, logprobs=0, stop=["cd"])
    assert (result.text, len(result.completions[0].logprobs)) == ("ab", 4)


async def test_every_parameter_reaches_the_engine(serve: Serve) -> None:
    engine = Recording()
    wanted: Any = {
        "min_p": 0.25, "typical_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {97: 2.0}, "min_tokens": 2, "priority": -3, "top_k": 5, "top_p": 0.5, "temperature": 0.5,
    }  # fmt: skip
    async with serve(engine) as running:
        await running.client.generate("ab", max_tokens=3, n=2, seed=7, **wanted)
    assert [sampling.seed for sampling in engine.asked] == [7, 8]
    for name, value in wanted.items():
        assert getattr(engine.asked[0], name) == value


async def test_the_prefix_cache_can_be_passed_by(serve: Serve) -> None:
    engine = Recording()
    async with serve(engine, http_port=0) as running:
        for bypass in (False, True):
            await running.client.generate("ab", max_tokens=3, bypass_prefix_cache=bypass)
        await running.client.chat([{"role": "user", "content": "ab"}], max_tokens=3, bypass_prefix_cache=True)
        url = f"{running.server.http.business.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as openai:
            create = openai.completions.create
            await create(model="model", prompt="ab", max_tokens=3, extra_body={"cache_prompt": False})
            await create(model="model", prompt="ab", max_tokens=3)
    assert [sampling.use_prefix_cache for sampling in engine.asked] == [True, False, False, False, True]


async def test_wrong_values_are_all_named(serve: Serve) -> None:
    async with serve() as running:
        with pytest.raises(InvalidRequestError) as error:
            await running.client.generate(
                "ab", min_p=2, typical_p=0, repetition_penalty=-1, logit_bias={300: 1}, logprobs=21, priority=5000
            )
    assert {violation.field for violation in error.value.violations} == {
        "sampling.min_p", "sampling.typical_p", "sampling.repetition_penalty", "sampling.logit_bias[0]",
        "output.logprobs", "priority",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("top_k", -1), ("max_tokens", -5), ("n", 2**40)])
async def test_numbers_that_do_not_fit_name_their_option(serve: Serve, name: str, value: int) -> None:
    options: Any = {name: value}
    async with serve() as running:
        with pytest.raises(ValueError, match=f"^{name} is {value}, allowed are 0 to 4294967295"):
            await running.client.generate("ab", **options)


async def test_an_engine_without_structured_output_says_so(serve: Serve) -> None:
    async with serve() as running:
        with pytest.raises(InvalidRequestError, match="structured_output: this engine has no structured output"):
            await running.client.generate("ab", json_schema={"type": "object"})
        with pytest.raises(TypeError, match="choice and regex exclude each other"):
            await running.client.generate("ab", regex="a", choice=["a"])


async def test_adapters(serve: Serve, tmp_path: Path) -> None:
    engine = Recording()
    async with serve(engine, control_port=0) as running:
        with ControlClient(running.server.control.address) as control:
            with pytest.raises(RpcError, match="NOT_FOUND: no adapter 'law' is loaded"):
                await running.client.generate("ab", adapter="law")
            loaded = await asyncio.to_thread(control.load_adapter, "law", str(tmp_path))
            assert (loaded.name, loaded.source) == ("law", str(tmp_path))
            with pytest.raises(RpcError, match="no adapter 'lore' is loaded, only law; load it first, or ask for none"):
                await running.client.generate("ab", adapter="lore")
            own = running.server.options.model_name
            for name, problem in ((own, f"name: '{own}' is the model's own"), ("a" * 129, "name: has 129 characters")):
                with pytest.raises(InvalidRequestError, match=problem):
                    await asyncio.to_thread(control.load_adapter, name, str(tmp_path))
            assert (await running.client.generate("ab", max_tokens=2, adapter="law")).text == "ab"
            assert engine.asked[-1].adapter == "law"
            assert await asyncio.to_thread(control.list_adapters) == [loaded]
            engine.step_s = 0.005
            stream = running.client.generate_stream("ab", max_tokens=4000, adapter="law")
            await anext(stream)
            with pytest.raises(RpcError, match="FAILED_PRECONDITION: adapter 'law' is in use"):
                await asyncio.to_thread(control.unload_adapter, "law")
            stream.cancel()
            await running.until(lambda: engine.num_requests == 0)
            await asyncio.to_thread(control.unload_adapter, "law")
            for wrong, code in (("law", "NOT_FOUND"), ("", "NOT_FOUND")):
                with pytest.raises(RpcError, match=code):
                    await asyncio.to_thread(control.unload_adapter, wrong)
            with pytest.raises(RpcError, match="FAILED_PRECONDITION"):
                await asyncio.to_thread(control.load_adapter, "law", str(tmp_path / "none"))


async def test_prompts_too_long_are_refused_or_cut(serve: Serve) -> None:
    async with serve(max_prompt_tokens=4, max_new_tokens=6) as running:
        with pytest.raises(InvalidRequestError, match="input: has 5 tokens, at most 4"):
            await running.client.generate("abcde", max_tokens=2)
        with pytest.raises(InvalidRequestError, match="is 7, this server makes at most 6 tokens"):
            await running.client.generate("ab", max_tokens=7)
    async with serve(max_prompt_tokens=4, truncate_prompts=True) as running:
        result = await running.client.generate("abcde", max_tokens=4)
    assert (result.text, result.usage.prompt_tokens) == ("bcde", 4)


async def test_one_tenant_cannot_take_every_place(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("alice a1\nbob b1\nalice a2\n")
    security = Security(tokens=load_tokens(tmp_path / "tokens"))
    options = {"max_running": 2, "max_per_tenant": 2, "client_options": {"token": "a1"}}
    async with serve(EchoEngine(vocab_size=259, step_s=0.005), security, **options) as running:
        tasks = [asyncio.create_task(running.client.generate("ab", max_tokens=4000)) for _ in range(2)]
        await running.until(lambda: running.server.admission.num_held == 2)
        with pytest.raises(OverloadedError, match="alice has 2 completions here, of at most 2") as error:
            await running.client.generate("ab", max_tokens=1)
        assert error.value.retry_after_s is not None
        from llama31_serve import AsyncClient

        async with AsyncClient(running.server.address, token="a2", max_attempts=1) as other_token:
            with pytest.raises(OverloadedError, match="alice"):
                await other_token.generate("ab", max_tokens=1)
        async with AsyncClient(running.server.address, token="b1", timeout_s=20) as bob:
            waits = asyncio.create_task(bob.generate("ab", max_tokens=2))
            await running.until(lambda: running.server.admission.num_held == 3)
            for task in tasks:
                task.cancel()
            assert (await waits).text == "ab"
    assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
