"""A server on loopback with an engine that echoes, a real tokenizer made here, and a check for leaks."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama31_serve import AsyncClient
from llama31_serve.server.app import Server
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.engine import Sampling
from llama31_serve.server.lifecycle import State
from llama31_serve.server.listener import Security
from llama31_serve.server.model_text import load_text
from llama31_serve.server.observer import Observer
from llama31_serve.server.options import ServerOptions
from llama31_serve.server.text import TextModel

SPECIAL_TOKENS = ("<|bos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer: byte b has id b, and control tokens follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    added = [{"id": 256 + i, "content": name, "special": True} for i, name in enumerate(SPECIAL_TOKENS)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {spelled[byte]: byte for byte in range(256)}, "merges": []},
    }
    config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


@pytest.fixture(scope="session")
def text_model(tokenizer_dir: Path) -> TextModel:
    """The tokenizer as the server takes it."""
    return load_text(tokenizer_dir)


@dataclass
class Running:
    """A server that serves, its engine, and a client of it that does not retry."""

    server: Server
    engine: EchoEngine
    client: AsyncClient

    def open_files(self) -> int:
        """File descriptors of this process: server and clients."""
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for a condition; fails the test if it does not come true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)


class SayingEngine(EchoEngine):
    """Says the same to everything, then stops."""

    def __init__(self, text: str, step_s: float = 0.0) -> None:
        super().__init__(vocab_size=259, eos_token_ids=(258,), step_s=step_s)
        self._ids = [*text.encode(), 258]

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        super().add(request_id, self._ids, sampling)


@pytest.fixture
def say() -> type[SayingEngine]:
    """Makes an engine that says a text."""
    return SayingEngine


Serve = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """The threads of before are the threads of after."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before and "llama31" in thread.name]
    assert not left


@pytest.fixture
def serve(text_model: TextModel, no_leaks: None) -> Serve:
    """`async with serve(engine=…, **options) as running`. On leaving, everything has to have been given back."""

    @asynccontextmanager
    async def run(
        engine: EchoEngine | None = None,
        security: Security | None = None,
        client_options: Any = None,
        observers: Sequence[Observer] = (),
        text: TextModel = text_model,
        **options: Any,
    ) -> AsyncIterator[Running]:
        echo = engine or EchoEngine(vocab_size=259, eos_token_ids=(258,))
        settings = ServerOptions(**{"port": 0, **options})
        server = Server(settings, lambda: text, lambda: echo, security, observers=observers)
        before = asyncio.all_tasks()
        await server.start()
        try:
            await server.load()
            asking = {"timeout_s": 120.0, "max_attempts": 1, **(client_options or {})}
            async with AsyncClient(server.address, **asking) as client:
                running = Running(server, echo, client)
                yield running
                await running.until(lambda: server.admission.num_held == 0)
            if server.lifecycle.state is State.SERVING:
                await server.drain()
        finally:
            ended = await server.close()
        assert ended
        assert (echo.num_requests, echo.num_used_blocks) == (0, 0)
        assert (server.admission.num_held, server.admission.num_running, server.engine.num_jobs) == (0, 0, 0)
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() - before - {asyncio.current_task()} if not _grpcs_own(task)]
        assert not left

    return run


def _grpcs_own(task: asyncio.Task[object]) -> bool:
    """grpc.aio's own pollers and servers end a moment later."""
    return "cygrpc" in repr(task) or "_server" in repr(task)
