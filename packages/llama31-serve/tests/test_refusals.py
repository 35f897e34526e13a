"""Bad requests: the status code, the field named in google.rpc.BadRequest, and nothing reaches the engine."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from llama31_serve import AsyncClient, AuthenticationError, InvalidRequestError, RpcError
from llama31_serve.stubs import inference_pb2 as pb
from llama31_serve.stubs.inference_pb2_grpc import InferenceServiceStub

Serve = Any

WRONG_OPTIONS = [
    ({"temperature": -0.5}, "sampling.temperature"),
    ({"temperature": float("nan")}, "sampling.temperature"),
    ({"temperature": float("inf")}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_p": 1.5}, "sampling.top_p"),
    ({"max_tokens": 0}, "stopping.max_tokens"),
    ({"max_tokens": 5000}, "stopping.max_tokens"),
    ({"max_tokens": 4096}, "stopping.max_tokens"),  # fits the context only without the prompt
    ({"stop": ["ok", ""]}, "stopping.stop_strings[1]"),
    ({"stop": ["x" * 257]}, "stopping.stop_strings[0]"),
    ({"stop": ["x"] * 17}, "stopping.stop_strings"),
    ({"stop_token_ids": [1, 259]}, "stopping.stop_token_ids[1]"),
    ({"stop_token_ids": [1] * 65}, "stopping.stop_token_ids"),
    ({"n": 17}, "output.n"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"request_id": "line\nbreak"}, "request_id"),
]


async def refused(client: AsyncClient, prompt: Any, options: dict[str, Any]) -> InvalidRequestError:
    """The error of Generate, after GenerateStream has given the same."""
    errors = []
    with pytest.raises(InvalidRequestError) as unary:
        await client.generate(prompt, **options)
    errors.append(unary.value)
    with pytest.raises(InvalidRequestError) as streamed:
        async for _ in client.generate_stream(prompt, **options):
            pass
    assert streamed.value.violations == unary.value.violations
    return unary.value


@pytest.mark.parametrize(("options", "field"), WRONG_OPTIONS)
async def test_wrong_option_names_its_field(serve: Serve, options: dict[str, Any], field: str) -> None:
    async with serve() as running:
        error = await refused(running.client, "a", options)
        assert running.engine.num_steps == 0
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]
    assert field in error.message


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "text.text"),
        ([], "token_ids.ids"),
        ([97, 259], "token_ids.ids[1]"),
        ([{"role": "", "content": "x"}], "conversation.messages[0].role"),
        ([{"role": "a b", "content": "x"}], "conversation.messages[0].role"),
        ("a" * 4096, "input"),
    ],
)
async def test_wrong_prompt_names_its_field(serve: Serve, prompt: Any, field: str) -> None:
    async with serve() as running:
        error = await refused(running.client, prompt, {})
    assert [violation.field for violation in error.violations] == [field]


async def test_all_wrong_fields_are_named_at_once(serve: Serve) -> None:
    async with serve() as running:
        error = await refused(running.client, "", {"temperature": -1, "n": 99})
    assert [violation.field for violation in error.violations] == ["text.text", "sampling.temperature", "output.n"]


async def test_empty_conversation(serve: Serve) -> None:
    async with serve() as running:
        with pytest.raises(InvalidRequestError, match="messages: is empty"):
            await running.client.chat([])


async def test_no_input_at_all(serve: Serve) -> None:
    async with serve() as running, grpc.aio.insecure_channel(running.server.address) as channel:
        stub = InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        for call, request in ((stub.Generate, pb.GenerateRequest()), (stub.Tokenize, pb.TokenizeRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(request)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "input: is not set" in (error.value.details() or "")


async def test_field_of_a_newer_proto_is_refused_not_ignored(serve: Serve) -> None:
    request = pb.GenerateRequest(text=pb.TextPrompt(text="a"))
    request.sampling.MergeFromString(b"\xa0\x06\x01")  # field 100, varint 1
    async with serve() as running, grpc.aio.insecure_channel(running.server.address) as channel:
        stub = InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.100: is a field this server does not know"):
            await stub.Generate(request)


async def test_control_tokens_in_text_need_permission(serve: Serve) -> None:
    async with serve() as running:
        for call in (running.client.generate, running.client.tokenize):
            with pytest.raises(AuthenticationError, match=r"PERMISSION_DENIED.*--allow_special_tokens"):
                await call("<|im_end|>", parse_special_tokens=True)


async def test_detokenize_outside_the_vocabulary(serve: Serve) -> None:
    async with serve() as running:
        with pytest.raises(InvalidRequestError, match=r"token_ids\[1\]: is 300, allowed are 0 to 258"):
            await running.client.detokenize([1, 300])


async def test_message_larger_than_the_limit(serve: Serve) -> None:
    async with serve() as running:
        with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
            await running.client.generate("x" * (4 * 1024 * 1024))
        assert (await running.client.generate("a", max_tokens=1)).text == "a"
