"""Before, while and after a server serves: what health, reflection and early callers are told."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from llama31_serve import AsyncClient, Client, UnavailableError
from llama31_serve.server.app import Server
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.engine import Engine
from llama31_serve.server.options import ServerOptions
from llama31_serve.server.text import TextModel

Serve = Any


async def test_before_the_warm_up_is_over(text_model: TextModel, no_leaks: None) -> None:
    go_on = threading.Event()

    class SlowStart(EchoEngine):
        def warm_up(self) -> None:
            assert go_on.wait(20)

    server = Server(ServerOptions(port=0), lambda: text_model, lambda: SlowStart(vocab_size=259))
    await server.start()
    loading = asyncio.create_task(server.load())
    try:
        async with AsyncClient(server.address, timeout_s=10, max_attempts=1) as client:
            assert not await client.is_serving()
            for call in (client.generate("a"), client.chat([{"role": "user", "content": "x"}]), client.tokenize("a")):
                with pytest.raises(UnavailableError, match="the model is still loading"):
                    await call
            with pytest.raises(UnavailableError, match="still loading"):
                await client.model_info()
            waiting = asyncio.create_task(client.wait_until_serving(20))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            go_on.set()
            await waiting
            assert (await client.generate("ab", max_tokens=2)).text == "ab"
    finally:
        go_on.set()
        await loading
        assert await server.close()


async def test_wait_until_serving_gives_up(text_model: TextModel, no_leaks: None) -> None:
    server = Server(ServerOptions(port=0), lambda: text_model, lambda: EchoEngine(vocab_size=259))
    await server.start()
    async with AsyncClient(server.address) as client:
        with pytest.raises(UnavailableError, match=r"does not serve after 0\.3 s"):
            await client.wait_until_serving(0.3)
    assert await server.close()


async def test_engine_that_cannot_be_loaded(text_model: TextModel, no_leaks: None) -> None:
    def fail() -> Engine:
        raise ValueError("model.safetensors is truncated")

    server = Server(ServerOptions(port=0), lambda: text_model, fail)
    await server.start()
    with pytest.raises(ValueError, match="truncated"):
        await server.load()
    async with AsyncClient(server.address) as client:
        assert not await client.is_serving()
    assert await server.close()


async def test_reflection_lists_and_describes_the_services(serve: Serve) -> None:
    async with serve(control_port=0) as running:

        def services(address: str) -> tuple[set[str], set[str]]:
            with Client(address) as client:
                database = ProtoReflectionDescriptorDatabase(client._channel)
                names = set(database.get_services())
                pool = DescriptorPool(database)
                ours = next(name for name in names if name.startswith("llama31."))
                return names, {method.name for method in pool.FindServiceByName(ours).methods}

        names, methods = await asyncio.to_thread(services, running.server.address)
        control_names, control_methods = await asyncio.to_thread(services, running.server.control.address)
    common = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert names == common | {"llama31.inference.v1.InferenceService", "fmaas.GenerationService"}
    assert control_names == common | {"llama31.inference.v1.ControlService"}
    assert {"Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Detokenize", "GetModelInfo"} == methods
    assert control_methods == {"GetServerInfo", "Abort", "Drain", "LoadAdapter", "UnloadAdapter", "ListAdapters"}


async def test_health_of_each_service(serve: Serve) -> None:
    async with serve(control_port=0) as running:

        async def status(address: str, service: str) -> str:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

        names = ("", "llama31.inference.v1.InferenceService", "llama31.inference.v1.ControlService")
        control = running.server.control.address
        assert [await status(control, name) for name in names] == ["SERVING"] * 3
        await running.server.drain()
        assert [await status(control, name) for name in names] == ["NOT_SERVING", "NOT_SERVING", "SERVING"]
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await status(running.server.address, "no.such.Service")


STUCK_SERVER = """
    import asyncio, sys, time
    from pathlib import Path
    from llama31_serve.commands.start import serve_until_signal
    from llama31_serve.server.app import Server
    from llama31_serve.server.model_text import load_text
    from llama31_serve.server.options import ServerOptions

    async def run():
        load = lambda: load_text(Path(sys.argv[1]))
        return await serve_until_signal(Server(ServerOptions(port=0), load, lambda: time.sleep(600)))

    raise SystemExit(asyncio.run(run()))
"""


def test_sigterm_while_it_loads(tokenizer_dir: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(STUCK_SERVER), str(tokenizer_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("Listening on ")
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
            assert "Daemon start success!" not in server.stdout.read()
        finally:
            server.kill()
