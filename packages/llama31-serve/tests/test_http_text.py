"""TGI's, vLLM's and MindIE's requests over HTTP, by an engine whose answers can be worked out by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.listener import Security
from llama31_serve.server.token_auth import Token

Serve = Any
HTTP = {"http_port": 0, "management_port": 0}
WRONG: list[tuple[str, object, int, str]] = [
    ("/generate", {"inputs": ""}, 422, "inputs: is empty"),
    ("/generate", {"inputs": "a", "parameters": {"temperature": -1}}, 422, "parameters.temperature: is -1"),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 0}}, 422, "parameters.max_new_tokens: is 0"),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": "9"}}, 422, "parameters.max_new_tokens: input"),
    ("/generate", {"inputs": "a", "parameters": {"best_of": 2}}, 422, "parameters.best_of: is 2, allowed is 1"),
    ("/generate", {"inputs": "a", "parameters": {"watermark": True}}, 422, "parameters.watermark"),
    ("/generate", {"inputs": "a", "parameters": {"top_kk": 2}}, 422, "parameters.top_kk: is a field this server"),
    ("/generate", {"inputs": "a", "parameters": {"stop": [""]}}, 422, "parameters.stop[0]: is empty"),
    ("/generate", {"inputs": "a", "parameters": {"adapter_id": "no"}}, 404, "no adapter 'no'"),
    ("/generate_stream", {"inputs": "a", "parameters": {"adapter_id": "no"}}, 404, "no adapter 'no'"),
    ("/generate", {"prompt": "a", "model": "no", "stream": True}, 404, "no model 'no' is served here; served are: "),
    ("/generate", {"input": "a"}, 422, "inputs: is missing; input: is a field"),
    ("/generate", {"prompt": "a", "top_p": 2}, 422, "top_p: is 2"),
    ("/generate", [1], 422, "body: input should be an object"),
    ("/generate", {"inputs": "a" * 5000}, 422, "inputs: has 5000 tokens"),
    ("/infer", {}, 422, "inputs: is missing"),
    ("/v1/tokenizer", {}, 422, "inputs: is missing"),
    ("/nowhere", {}, 404, "there is no POST /nowhere"),
]


@pytest.fixture
async def running(serve: Serve) -> AsyncIterator[Any]:
    async with serve(**HTTP) as running:
        yield running


def asking(running: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.server.http.business.url, timeout=20, **options)


async def post(running: Any, path: str, body: object, **options: Any) -> httpx.Response:
    async with asking(running) as client:
        return await client.post(path, json=body, **options)


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


async def test_the_guides_request(running: Any) -> None:
    headers = {"Accept": "application/json", "Content-type": "application/json"}
    inputs = "<|im_start|>user\n请介绍一下自己<|im_end|>\n<|im_start|>assistant\n"
    response = await post(running, "/generate", {"inputs": inputs, "stream": False}, headers=headers)
    assert response.status_code == 200
    assert response.json() == {"generated_text": "<|im_start|>user\n请"}  # 20 tokens by default, a byte each


async def test_text_with_every_parameter(running: Any) -> None:
    parameters = {
        "adapter_id": None, "best_of": 1, "decoder_input_details": True, "details": True, "do_sample": True,
        "frequency_penalty": 0.1, "ignore_eos": True, "include_stop_str_in_output": False, "max_new_tokens": 30,
        "presence_penalty": 0.1, "priority": 5, "repetition_penalty": 1.03, "return_full_text": True, "seed": 7,
        "skip_special_tokens": True, "stop": ["ca"], "temperature": 0.5, "timeout": 10, "top_k": 10,
        "top_n_tokens": 2, "top_p": 0.95, "truncate": 3, "typical_p": 0.5, "watermark": False,
    }  # fmt: skip
    response = await post(running, "/generate", {"inputs": "xxabc", "parameters": parameters})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["generated_text"] == "xxabcab"
    details = answer["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("stop_sequence", 4, 7)
    assert [token["text"] for token in details["prefill"]] == ["a", "b", "c"]
    assert [token["id"] for token in details["tokens"]] == [97, 98, 99, 97]
    assert details["top_tokens"][0][0] == {"id": 97, "text": "a", "logprob": 0.0, "special": False}


async def test_text_stream(running: Any) -> None:
    body = {"inputs": "你a", "parameters": {"max_new_tokens": 4}}
    response = await post(running, "/generate_stream", body)
    found = events(response)
    assert [event["token"]["text"] for event in found] == ["", "", "你", "a"]
    assert [event["token"]["id"] for event in found] == [*"你a".encode()]
    assert all(event["generated_text"] is None for event in found[:-1])
    assert found[-1]["generated_text"] == "你a"
    assert found[-1]["details"] == {"finish_reason": "length", "generated_tokens": 4, "seed": None}
    same = await post(running, "/generate", {**body, "stream": True})
    assert events(same) == found
    assert events(await post(running, "/", {**body, "stream": True})) == found
    assert (await post(running, "/", body)).json() == [{"generated_text": "你a"}]


async def test_stream_that_a_stop_token_ends(serve: Serve, say: Any) -> None:
    async with serve(engine=say("ab"), **HTTP) as running:
        found = events(await post(running, "/generate_stream", {"inputs": "x"}))
        assert "".join(event["token"]["text"] for event in found) == "ab"
        assert (found[-1]["generated_text"], found[-1]["details"]["finish_reason"]) == ("ab", "eos_token")


async def test_infer(running: Any) -> None:
    body = {"inputs": "ab", "stream": False, "parameters": {"max_new_tokens": 3, "details": True, "priority": 5}}
    answer = (await post(running, "/infer", body)).json()
    assert answer["generated_text"] == "aba"
    assert answer["details"]["finish_reason"] == "length"
    found = events(await post(running, "/infer", {**body, "stream": True}))
    assert "".join(event["token"]["text"] for event in found) == "aba"
    assert [token for event in found for token in event["token"]["id"]] == [*b"aba"]
    assert found[0]["prefill_time"] > 0
    assert found[0]["decode_time"] is None
    assert found[-1]["generated_text"] == "aba"


async def test_vllm_prompt(running: Any) -> None:
    body = {"prompt": "ab", "max_tokens": 3, "n": 2, "best_of": 2, "temperature": 0.5, "top_k": -1, "model": "None"}
    assert (await post(running, "/generate", body)).json() == {"text": ["ababa", "ababa"]}
    response = await post(running, "/generate", {**body, "n": 1, "best_of": 1, "stream": True})
    assert [json.loads(part)["text"] for part in response.text.split("\0") if part][-1] == ["ababa"]


async def test_token_count_and_models(running: Any) -> None:
    counted = (await post(running, "/v1/tokenizer", {"inputs": "a你"})).json()
    assert counted == {"token_number": 4, "tokens": ["a", "你"]}
    async with asking(running) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
        assert (model["id"], model["max_model_len"]) == ("model", 4096)
        assert (await client.get("/v1/models/model")).json() == model
        assert (await client.get("/v1/models/other")).status_code == 404


async def test_wrong_requests(running: Any) -> None:
    for path, body, status, message in WRONG:
        response = await post(running, path, body)
        assert response.status_code == status, (path, body)
        assert message in response.json()["error"]
        assert set(response.json()) == {"error", "type"}


async def test_bodies_that_are_none(running: Any) -> None:
    async with asking(running) as client:
        for content in (b"", b"{", b"\xff\xfe", b'{"inputs":"a"', b"[" * 100_000):
            response = await client.post("/generate", content=content)
            assert response.status_code == 422, content[:20]
        assert (await client.post("/generate", content=b"x" * (4 * 1024 * 1024 + 1))).status_code == 413
        assert (await client.get("/generate")).status_code == 405


async def test_full_and_draining(serve: Serve) -> None:
    async with serve(engine=EchoEngine(vocab_size=259, step_s=0.01), max_running=1, **HTTP) as running:
        body = {"inputs": "ab", "parameters": {"max_new_tokens": 100}}
        open_ = [asyncio.create_task(post(running, "/generate", body)) for _ in range(3)]
        await running.until(lambda: running.server.admission.num_held == 3)
        full = await post(running, "/generate", body)
        assert (full.status_code, full.json()["type"]) == (503, "Service Unavailable")
        assert int(full.headers["retry-after"]) >= 1
        for task in open_:
            assert (await task).status_code == 200
        management = running.server.http.management.url
        async with httpx.AsyncClient(base_url=management) as client:
            for path in ("/health", "/v2/health/live", "/v2/health/ready"):
                assert (await client.get(path)).status_code == 200
            info = (await client.get("/info")).json()
            assert (info["models"][0]["model_id"], info["models"][0]["max_total_tokens"]) == ("model", 4096)
            assert not running.server.drain_requested.is_set()
            assert (await client.get("/stopService")).status_code == 200
            assert running.server.drain_requested.is_set()
            await running.server.drain()
            assert (await client.get("/v2/health/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/v2/health/live")).status_code == 200
        assert (await post(running, "/generate", body)).status_code == 503


async def test_a_client_that_goes_away_frees_its_place(serve: Serve) -> None:
    engine = EchoEngine(vocab_size=259, step_s=0.005)
    async with serve(engine=engine, **HTTP) as running:
        body = {"inputs": "ab", "parameters": {"max_new_tokens": 4000}}
        async with asking(running) as client:
            for path in ("/generate", "/generate_stream", "/infer"):
                request = asyncio.create_task(client.post(path, json=body))
                await running.until(lambda: engine.num_requests == 1)
                request.cancel()
                await running.until(lambda: engine.num_requests == 0 and running.server.admission.num_held == 0)
        assert engine.num_aborted == 3


async def test_time_limit_and_engine_failure(serve: Serve) -> None:
    class Failing(EchoEngine):
        def step(self) -> Any:
            if any(request.prompt_ids == [*b"fail"] for request in self._requests.values()):
                raise RuntimeError("a kernel failed")
            return super().step()

    async with serve(engine=Failing(vocab_size=259, step_s=0.01), **HTTP) as running:
        late = await post(running, "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 900, "timeout": 0.1}})
        assert (late.status_code, late.json()["type"]) == (408, "Timeout Error")
        failed = await post(running, "/generate", {"inputs": "fail"})
        assert (failed.status_code, failed.json()["type"]) == (424, "Generation Error")
        assert (await post(running, "/generate", {"inputs": "a"})).status_code == 200


async def test_tokens_and_request_ids(serve: Serve) -> None:
    async with serve(
        security=Security(tokens=(Token(b"secret", "team"),)), client_options={"token": "secret"}, **HTTP
    ) as r:
        wrong = await post(r, "/generate", {"inputs": "a"}, headers={"Authorization": "Bearer no"})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
        good = {"Authorization": "Bearer secret", "X-Request-Id": "mine-1"}
        right = await post(r, "/generate", {"inputs": "a"}, headers=good)
        assert (right.status_code, right.headers["x-request-id"]) == (200, "mine-1")
        async with httpx.AsyncClient(base_url=r.server.http.management.url) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/info")).status_code == 401
            assert (await client.post("/stopService")).status_code == 401


async def test_control_tokens_in_text_are_text_unless_allowed(serve: Serve) -> None:
    body = {"inputs": "<|im_start|>a", "parameters": {"max_new_tokens": 3, "skip_special_tokens": False}}
    async with serve(**HTTP) as running:
        assert (await post(running, "/generate", body)).json()["generated_text"] == "<|i"
    async with serve(allow_special_tokens=True, **HTTP) as running:
        assert (await post(running, "/generate", body)).json()["generated_text"] == "<|im_start|>a<|im_start|>"
