"""OpenAI's routes, asked by the official client."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from llama31_serve.server.echo_engine import EchoEngine

Serve = Any
HTTP = {"http_port": 0}
HI: Any = [{"role": "user", "content": "Hi"}]
ECHO = "user\nHi"  # the prompt up to its first stop token, without control tokens
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = '{"name": "weather", "parameters": {"city": "Bern"}}'


def client_of(running: Any) -> AsyncOpenAI:
    url = f"{running.server.http.business.url}/v1"
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=20)


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[AsyncOpenAI]:
    engine = EchoEngine(vocab_size=259)
    async with serve(engine=engine, **HTTP) as running, client_of(running) as client:
        yield client


async def test_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="model", messages=HI, n=2, seed=1, user="me")
    assert [choice.message.content for choice in answer.choices] == [ECHO, ECHO]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 16, 36)
    assert answer.object == "chat.completion"


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="model", messages=HI, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ECHO[:4]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


async def test_chat_logprobs_and_stop(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="model", messages=HI, logprobs=True, top_logprobs=2, stop=["Hi"], extra_body={"top_k": 5, "min_p": 0.1}
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("user\n", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    entry = choice.logprobs.content[1]
    assert (entry.token, entry.bytes, entry.logprob) == ("u", [117], 0.0)
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("u", 0.0), ("v", -1.0)]


@pytest.mark.parametrize("streamed", [False, True])
async def test_tools(serve: Serve, say: Any, streamed: bool) -> None:
    async with serve(engine=say(CALL), **HTTP) as running, client_of(running) as client:
        messages: Any = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]  # fmt: skip
        asked: Any = {"model": "model", "messages": messages, "tools": TOOLS, "tool_choice": "auto"}
        if streamed:
            chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
            assert not any(chunk.choices[0].delta.content for chunk in chunks)
            [call] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = await client.chat.completions.create(**asked)
            [call] = answer.choices[0].message.tool_calls
            assert answer.choices[0].message.content is None
            reason = answer.choices[0].finish_reason
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bern"})
        assert reason == "tool_calls"
        # Without tools the same text is text.
        plain = await client.chat.completions.create(model="model", messages=HI)
        assert plain.choices[0].message.content == CALL
        none = await client.chat.completions.create(**{**asked, "tool_choice": "none"})
        assert none.choices[0].message.content == CALL


async def test_tools_that_the_model_would_not_hear_of(serve: Serve, say: Any, text_model: Any) -> None:
    text_model = dataclasses.replace(text_model, shows_tools=False)
    async with serve(engine=say(CALL), text=text_model, **HTTP) as running, client_of(running) as client:
        with pytest.raises(openai.BadRequestError, match="this model's chat template has no place for them"):
            await client.chat.completions.create(model="model", messages=HI, tools=TOOLS)
        plain = await client.chat.completions.create(model="model", messages=HI, tools=TOOLS, tool_choice="none")
        assert plain.choices[0].message.content == CALL


async def test_text_where_tools_are_offered(serve: Serve, say: Any) -> None:
    for text in ("It rains.", "{not a call}", "[1]"):
        async with serve(engine=say(text), **HTTP) as running, client_of(running) as client:
            stream = await client.chat.completions.create(model="model", messages=HI, tools=TOOLS, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
            assert chunks[-1].choices[0].finish_reason == "stop"


async def test_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="model", prompt=["ab", "cde"], max_tokens=4, n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "abab"), (1, "abab"), (2, "cdec"), (3, "cdec"),
    ]  # fmt: skip
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)
    ids = await client.completions.create(model="model", prompt=[97, 98], echo=True, logprobs=1, max_tokens=2)
    assert ids.choices[0].text == "abab"
    logprobs = ids.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["a", "b", "a", "b"], [0, 1, 2, 3])
    assert logprobs.token_logprobs == [None, 0.0, 0.0, 0.0]


async def test_completions_stream(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="model", prompt=["ab", "c"], max_tokens=4, stream=True, stream_options={"include_usage": True}, echo=True
    )
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        last = chunk
    assert texts == ["ababab", "ccccc"]
    assert last.usage is not None
    assert last.usage.total_tokens == 11


async def test_models_and_adapters(serve: Serve, tmp_path: Path) -> None:
    async with serve(**HTTP) as running, client_of(running) as client:
        running.server.engine.call(lambda engine: engine.load_adapter("tuned", tmp_path)).result(timeout=10)
        assert [model.id async for model in client.models.list()] == ["model", "tuned"]
        answer = await client.chat.completions.create(model="tuned", messages=HI, max_tokens=2)
        assert answer.model == "tuned"
        problem = "no model 'other' is served here; served are: model, tuned"
        for stream in (False, True):  # a stream has not begun either: it is a 404
            with pytest.raises(openai.NotFoundError, match=problem):
                await client.chat.completions.create(model="other", messages=HI, stream=stream)
            with pytest.raises(openai.NotFoundError, match=problem):
                await client.completions.create(model="other", prompt="ab", stream=stream)
        with pytest.raises(openai.NotFoundError, match=problem):
            await client.models.retrieve("other")


async def test_errors_have_openais_form(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="model", messages=HI, temperature=-1)
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="messages"):
        await client.chat.completions.create(model="model", messages=[])
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        await client.chat.completions.create(model="model", messages=HI, tool_choice="required")
    with pytest.raises(openai.BadRequestError, match="frobnicate: is a field this server does not know"):
        await client.chat.completions.create(model="model", messages=HI, extra_body={"frobnicate": 1})
    with pytest.raises(openai.BadRequestError, match="prompt"):
        await client.completions.create(model="model", prompt=["a", ""])
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        await client.completions.create(model="model", prompt="a", logit_bias={"x": 1})


async def test_overload_is_a_rate_limit(serve: Serve) -> None:
    async with serve(max_running=1, **HTTP) as running, client_of(running) as client:
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="model", prompt=["a"] * 4)
