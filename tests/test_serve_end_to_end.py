"""SmolLM2 from its GGUF file to an answer over gRPC: converted, served by the command, asked by the clients."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from llama31_ckpt.cli import main as ckpt
from llama31_serve import AsyncClient, Client, DeadlineError
from llama31_tokenizer import ChatFormat, Tokenizer
from model_assets import fetch

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
START_TIMEOUT_S, STOP_TIMEOUT_S = 240, 60


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smollm2-135m-instruct"
    gguf = str(fetch("smollm2-gguf"))
    assert ckpt(["convert", "--input_path", gguf, "--output_path", str(path), "--dtype", "fp32"]) == 0
    return path


def start_command(model_dir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "llama31_serve", "start", "--model", str(model_dir), "--max_seq_len", "1024", *flags]


@dataclass(frozen=True)
class Addresses:
    """Where the server is."""

    grpc: str
    http: str


@pytest.fixture(scope="module")
def addresses(model_dir: Path) -> Iterator[Addresses]:
    """A running server; after the tests it has to end well on SIGTERM."""
    command = start_command(model_dir, "--port", "0", "--http_port", "0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            listening = server.stdout.readline().split(";")[0].removeprefix("Listening on ").strip()
            http = server.stdout.readline().removeprefix("HTTP (business) on ").strip()
            with Client(listening) as client:
                client.wait_until_serving(START_TIMEOUT_S)
            ready = server.stdout.readline()
            assert ready == f"Daemon start success! smollm2-135m-instruct is served on {listening} (gRPC)\n"
            yield Addresses(listening, http)
            server.send_signal(signal.SIGTERM)
            assert server.wait(STOP_TIMEOUT_S) == 0
        finally:
            server.kill()


@pytest.fixture
def address(addresses: Addresses) -> str:
    """Where gRPC is."""
    return addresses.grpc


def test_chat(address: str) -> None:
    with Client(address, timeout_s=120) as client:
        result = client.chat(QUESTION, temperature=0, max_tokens=40)
    assert (result.text, result.finish_reason) == (ANSWER, "stop_token")


async def test_stream_equals_the_whole_and_the_tokenizer(address: str, model_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(model_dir)
    prompt_ids = list(ChatFormat(tokenizer).encode_dialog(QUESTION, add_generation_prompt=True).ids)
    async with AsyncClient(address, timeout_s=120) as client:
        assert await client.tokenize(QUESTION) == prompt_ids
        async with client.chat_stream(QUESTION, temperature=0, max_tokens=40) as stream:
            text = "".join([chunk.text async for chunk in stream])
        assert stream.result is not None
        assert text == stream.result.text == ANSWER
        assert tokenizer.decode(stream.result.completions[0].token_ids) == ANSWER
        same = await client.generate(prompt_ids, temperature=0, max_tokens=40)
        assert same.completions == stream.result.completions


async def test_batched_answers_equal_those_given_alone(address: str) -> None:
    prompts = ["The capital of France is", "Water boils at", "One, two, three,", "def add(a, b):"]
    async with AsyncClient(address, timeout_s=120) as client:

        async def answer(prompt: str) -> str:
            return (await client.generate(prompt, temperature=0, max_tokens=12)).text

        alone = [await answer(prompt) for prompt in prompts]
        together = await asyncio.gather(*(answer(prompt) for prompt in prompts))
    assert together == alone
    assert "Paris" in alone[0]


async def test_a_request_past_its_deadline_leaves_the_engine_to_others(address: str) -> None:
    async with AsyncClient(address, timeout_s=120) as client:
        with pytest.raises(DeadlineError):
            await client.generate("Once upon a time", ignore_eos=True, max_tokens=900, timeout_s=0.5)
        assert (await client.chat(QUESTION, temperature=0)).text == ANSWER


def test_openais_client(addresses: Addresses) -> None:
    with OpenAI(base_url=f"{addresses.http}/v1", api_key="none", max_retries=0, timeout=120) as client:
        asked: Any = {"model": client.models.list().data[0].id, "messages": QUESTION, "temperature": 0}
        answer = client.chat.completions.create(**asked)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == ANSWER
        assert len(pieces) > 3


CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "inhabitants": {"type": "integer"}},
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}


def test_structured_output_over_http(addresses: Addresses) -> None:
    with OpenAI(base_url=f"{addresses.http}/v1", api_key="none", max_retries=0, timeout=120) as client:
        name = client.models.list().data[0].id
        create: Any = functools.partial(client.chat.completions.create, model=name, messages=QUESTION, temperature=0)
        schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
        answer = create(response_format=schema).choices[0]
        assert (answer.finish_reason, set(json.loads(answer.message.content))) == ("stop", set(CITY["properties"]))
        assert create(max_tokens=9, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")
        choice = create(extra_body={"guided_choice": ["Rome", "Paris", "Oslo"]})
        assert choice.choices[0].message.content == "Paris"
        tool = {"type": "function", "function": {"name": "find_city", "description": "Find", "parameters": CITY}}
        [call] = create(tools=[tool], tool_choice="required", max_tokens=80).choices[0].message.tool_calls
        assert call.function.name == "find_city"
        assert set(json.loads(call.function.arguments)) == set(CITY["properties"])
        wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
        with pytest.raises(BadRequestError, match="json_schema cannot be used"):
            create(response_format=wrong)
        bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}
        for wrongly, field in (
            ({"extra_body": {"guided_regex": "(["}}, "guided_regex"),
            ({"extra_body": {"guided_grammar": "no rule"}}, "guided_grammar"),
            ({"tools": [bad], "tool_choice": "required"}, "tools"),
        ):
            with pytest.raises(BadRequestError) as refused:
                create(**wrongly)
            assert refused.value.body["param"] == field  # type: ignore[index]


def test_structured_output_over_grpc(address: str) -> None:
    with Client(address, timeout_s=120) as client:
        number = client.generate("2 + 2 = ", regex="[0-9]{1,3}", temperature=0, max_tokens=8)
        assert number.text.isdigit()
        assert json.loads(client.chat(QUESTION, json_schema=CITY, temperature=0, max_tokens=60).text)["city"]
        assert client.chat(QUESTION, choice=["Rome", "Paris"], temperature=0).text == "Paris"
        nested = client.generate("((", lark='start: "(" start ")" | "x"', temperature=0, max_tokens=40)
        assert nested.text.strip("()") == "x"


def test_tgis_request(addresses: Addresses) -> None:
    body = json.dumps({"inputs": "The capital of France is", "parameters": {"max_new_tokens": 4}, "stream": False})
    request = urllib.request.Request(f"{addresses.http}/generate", body.encode(), {"Content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        assert "Paris" in json.load(response)["generated_text"]


def test_port_taken_is_said_before_the_weights_are_read(address: str, model_dir: Path) -> None:
    command = start_command(model_dir, "--port", address.rsplit(":", 1)[1])
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"llama31-serve: error: cannot listen on {address}: Address already in use")


def test_truncated_weights(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    os.truncate(broken / "model.safetensors", 1_000_000)
    command = start_command(broken, "--port", "0")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "Daemon start success!" not in result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert "model.safetensors" in result.stderr
