"""fmaas.GenerationService as TGIS's clients see it, over the echo engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.stubs import generation_pb2 as pb
from llama31_serve.stubs.generation_pb2_grpc import GenerationServiceStub

Serve = Any
NUMBERS = {  # TGIS's proto/generation.proto
    "BatchedGenerationRequest": {"model_id": 1, "prefix_id": 2, "requests": 3, "params": 10},
    "SingleGenerationRequest": {"model_id": 1, "prefix_id": 2, "request": 3, "params": 10},
    "GenerationRequest": {"text": 2},
    "GenerationResponse": {
        "generated_token_count": 2, "text": 4, "input_token_count": 6, "stop_reason": 7, "tokens": 8,
        "input_tokens": 9, "seed": 10,
    },
    "Parameters": {"method": 1, "sampling": 2, "stopping": 3, "response": 4, "decoding": 5, "truncate_input_tokens": 6},
    "SamplingParameters": {"temperature": 1, "top_k": 2, "top_p": 3, "seed": 5},
    "StoppingCriteria": {"max_new_tokens": 1, "min_new_tokens": 2, "time_limit_millis": 3, "stop_sequences": 4},
    "TokenInfo": {"text": 2, "logprob": 3, "rank": 4, "top_tokens": 5},
}  # fmt: skip


@asynccontextmanager
async def stub_of(running: Any) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(running.server.address) as channel:
        yield GenerationServiceStub(channel)  # type: ignore[no-untyped-call]


def batch(*texts: str, **params: Any) -> pb.BatchedGenerationRequest:
    requests = [pb.GenerationRequest(text=text) for text in texts]
    return pb.BatchedGenerationRequest(model_id="any", requests=requests, params=pb.Parameters(**params))


@pytest.mark.parametrize("message", sorted(NUMBERS))
def test_field_numbers_are_tgis(message: str) -> None:
    fields = pb.DESCRIPTOR.message_types_by_name[message].fields
    assert {field.name: field.number for field in fields} == NUMBERS[message]


async def test_batch_with_defaults(serve: Serve) -> None:
    async with serve() as running, stub_of(running) as stub:
        response = await stub.Generate(batch("abc", "xy"))
    assert [one.text for one in response.responses] == ["abc" * 6 + "ab", "xy" * 10]  # 20 tokens
    assert [one.stop_reason for one in response.responses] == [pb.MAX_TOKENS] * 2
    assert [(one.input_token_count, one.generated_token_count) for one in response.responses] == [(3, 20), (2, 20)]


async def test_stop_reasons(serve: Serve) -> None:
    slow = EchoEngine(vocab_size=259, max_seq_len=64, eos_token_ids=(ord("!"),), step_s=0.002)
    async with serve(slow) as running, stub_of(running) as stub:

        async def ask(text: str, **stopping: Any) -> Any:
            return (await stub.Generate(batch(text, stopping=pb.StoppingCriteria(**stopping)))).responses[0]

        assert (await ask("ab!")).stop_reason == pb.EOS_TOKEN
        stopped = await ask("hello ", stop_sequences=["o h"], max_new_tokens=30)
        assert (stopped.stop_reason, stopped.text) == (pb.STOP_SEQUENCE, "hello h")  # TGIS keeps the sequence
        assert (await ask("ab", max_new_tokens=3)).stop_reason == pb.MAX_TOKENS
        assert (await ask("a" * 50)).stop_reason == pb.TOKEN_LIMIT
        slow.step_s = 0.02
        limited = await ask("abc", max_new_tokens=60, time_limit_millis=100)
        assert limited.stop_reason == pb.TIME_LIMIT
        assert 0 < limited.generated_token_count < 60
        assert limited.text.startswith("abc"[: limited.generated_token_count])


async def test_stream(serve: Serve) -> None:
    async with serve() as running, stub_of(running) as stub:
        request = pb.SingleGenerationRequest(
            request=pb.GenerationRequest(text="abc"),
            params=pb.Parameters(
                method=pb.SAMPLE,
                sampling=pb.SamplingParameters(seed=5),
                stopping=pb.StoppingCriteria(max_new_tokens=6),
                response=pb.ResponseOptions(input_text=True, generated_tokens=True),
            ),
        )
        messages = [message async for message in stub.GenerateStream(request)]
    assert (messages[0].input_token_count, messages[0].seed, messages[0].text) == (3, 5, "abc")
    assert "".join(message.text for message in messages) == "abcabcabc"
    assert [token.text for message in messages for token in message.tokens] == list("abcabc")
    assert [message.stop_reason for message in messages[:-1]] == [pb.NOT_FINISHED] * (len(messages) - 1)
    assert (messages[-1].stop_reason, messages[-1].generated_token_count) == (pb.MAX_TOKENS, 6)


async def test_token_details(serve: Serve) -> None:
    response = pb.ResponseOptions(
        input_tokens=True, generated_tokens=True, token_logprobs=True, token_ranks=True, top_n_tokens=2
    )
    async with serve() as running, stub_of(running) as stub:
        stopping = pb.StoppingCriteria(max_new_tokens=2)
        answer = (await stub.Generate(batch("ab", response=response, stopping=stopping))).responses[0]
    assert [(token.text, token.logprob, token.rank) for token in answer.tokens] == [("a", 0.0, 1), ("b", 0.0, 1)]
    assert [(top.text, top.logprob) for top in answer.tokens[0].top_tokens] == [("a", 0.0), ("b", -1.0)]
    assert [(token.text, token.rank) for token in answer.input_tokens] == [("a", 0), ("b", 1)]


async def test_truncation_tokenize_and_model_info(serve: Serve) -> None:
    async with serve() as running, stub_of(running) as stub:
        cut = (await stub.Generate(batch("abcdef", truncate_input_tokens=2))).responses[0]
        assert (cut.input_token_count, cut.text[:4]) == (2, "efef")
        requests = [pb.TokenizeRequest(text="ab"), pb.TokenizeRequest(text="")]
        tokens = await stub.Tokenize(pb.BatchedTokenizeRequest(requests=requests, return_tokens=True))
        assert [(one.token_count, list(one.tokens)) for one in tokens.responses] == [(2, ["a", "b"]), (0, [])]
        info = await stub.ModelInfo(pb.ModelInfoRequest())
        assert (info.model_kind, info.max_sequence_length) == (pb.ModelInfoResponse.DECODER_ONLY, 4096)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (batch("a", stopping=pb.StoppingCriteria(stop_sequences=["x"] * 7)), "params.stopping.stop_sequences"),
        (batch("a", stopping=pb.StoppingCriteria(stop_sequences=["x" * 241])), r"params.stopping.stop_sequences\[0\]"),
        (batch("a", stopping=pb.StoppingCriteria(max_new_tokens=5000)), "params.stopping.max_new_tokens"),
        (batch("a", response=pb.ResponseOptions(top_n_tokens=6)), "params.response.top_n_tokens"),
        (batch("a", method=pb.SAMPLE, sampling=pb.SamplingParameters(top_p=2)), "params.sampling.top_p"),
        (batch(""), "request.text"),
        (batch(), "requests"),
        (pb.BatchedGenerationRequest(prefix_id="p", requests=[pb.GenerationRequest(text="a")]), "prefix_id"),
    ],
)
async def test_refusals(serve: Serve, request_: pb.BatchedGenerationRequest, field: str) -> None:
    async with serve() as running, stub_of(running) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match=field) as error:
            await stub.Generate(request_)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
