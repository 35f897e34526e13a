"""The llama31-serve command: what it prints and its exit codes."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama31_core import ModelConfig
from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.checkpoint.writer import save_weights
from llama31_serve import Client, ControlClient
from llama31_serve.cli import build_parser, main
from llama31_serve.server.start_settings import read_settings

Serve = Any
ECHO_SERVER = """
    import asyncio, sys
    from pathlib import Path
    from llama31_serve.commands.start import serve_until_signal
    from llama31_serve.server.app import Server
    from llama31_serve.server.echo_engine import EchoEngine
    from llama31_serve.server.model_text import load_text
    from llama31_serve.server.options import ServerOptions

    async def run():
        engine = EchoEngine(vocab_size=259, step_s=0.005)
        options = ServerOptions(port=0, control_port=0, model_name="echo", max_running=4)
        return await serve_until_signal(Server(options, lambda: load_text(Path(sys.argv[1])), lambda: engine))

    raise SystemExit(asyncio.run(run()))
"""


def complain(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert "Daemon start success!" not in captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("llama31-serve: error: ")
    return lines[0]


@pytest.fixture
def model_dir(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A model directory whose weights are zeros, of a model too small to run."""
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 259,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    shapes = parameter_shapes(ModelConfig.from_pretrained(tmp_path))
    save_weights(tmp_path, [(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()])
    return tmp_path


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has neither tokenizer.model nor tokenizer.json"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_start_with_an_incomplete_model(
    capsys: pytest.CaptureFixture[str], model_dir: Path, missing: str, message: str
) -> None:
    (model_dir / missing).unlink()
    assert message in complain(capsys, "start", "--model", str(model_dir), "--port", "0")


def test_start_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such directory" in complain(capsys, "start", "--model", str(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert "is a file" in complain(capsys, "start", "--model", str(tmp_path / "file"))


def test_start_with_the_port_taken(capsys: pytest.CaptureFixture[str], model_dir: Path, no_leaks: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = complain(capsys, "start", "--model", str(model_dir), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "--allow_any_address"),
        (("--host", "::"), "--allow_any_address"),
        (("--port", "70000"), "--port is 70000"),
        (("--host", "no-such-host.invalid"), "cannot listen on no-such-host.invalid:50051: "),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1:50051: Cannot assign requested address"),
        (("--max_running", "0"), "--max_running is 0"),
        (("--max_seq_len", "100000"), "max_seq_len is 100000, allowed is 1 to"),
        (("--block_size", "0"), "block_size is 0, allowed is an integer >= 1"),
        (("--kv_cache_dtype", "fp8"), "kv_cache_dtype is 'fp8', allowed are 'auto', 'float32', 'bfloat16'"),
        (("--drain_timeout_s", "-1"), "--drain_timeout_s is -1"),
    ],
)
def test_start_with_a_wrong_option(
    capsys: pytest.CaptureFixture[str], model_dir: Path, flags: tuple[str, ...], message: str
) -> None:
    assert message in complain(capsys, "start", "--model", str(model_dir), *flags)


@pytest.mark.parametrize("argv", [(), ("start",), ("unknown",), ("start", "--model", "x", "--no_such_flag")])
def test_wrong_usage(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2


async def test_asking_commands(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    async with serve() as running:

        async def output(*argv: str) -> str:
            assert await asyncio.to_thread(main, (*argv, "--address", running.server.address)) == 0
            return capsys.readouterr().out

        assert await output("generate", "abc", "--max_tokens", "5", "--temperature", "0") == "abcab\n"
        assert await output("generate", "abc", "--max_tokens", "50", "--stop", "ca") == "ab\n"
        assert await output("chat", "Hi", "--max_tokens", "40") == "user\nHi\n"
        assert await output("chat", "Hi", "--max_tokens", "40", "--system", "Be") == "system\nBe\n"
        assert await output("health", "--wait_s", "5") == "SERVING\n"
        services = (await output("describe")).splitlines()
        assert {"llama31.inference.v1.InferenceService", "fmaas.GenerationService"} <= set(services)
        methods = await output("describe", "llama31.inference.v1.InferenceService")
        assert "rpc ChatStream(llama31.inference.v1.ChatStreamRequest) returns (stream llama31.inference" in methods
        fields = await output("describe", "llama31.inference.v1.GenerateRequest")
        assert "llama31.inference.v1.TextPrompt text  // one of input" in fields
        table = await output("bench", "--requests", "6", "--tokens", "5", "--concurrency", "1", "3", "--rate", "500")
        assert [line.split()[0] for line in table.splitlines()] == ["in", "1", "3"]
        assert all(len(line.split()) == 9 and float(line.split()[1]) > 0 for line in table.splitlines()[1:])


def test_asking_where_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert "UNAVAILABLE" in complain(capsys, "generate", "x", "--address", address)
        assert "UNAVAILABLE" in complain(capsys, "health", "--address", address)
        assert "UNAVAILABLE" in complain(capsys, "bench", "--address", address)
        assert "UNAVAILABLE" in complain(capsys, "describe", "--address", address)
        assert "--requests is 0" in complain(capsys, "bench", "--requests", "0")


def until_accepted(address: str, count: int) -> None:
    """Wait until a server has taken so many requests: what is on its way when it drains is not accepted any more."""
    deadline_s = time.monotonic() + 120
    with ControlClient(address) as control:
        taken = 0
        while taken < count:
            assert time.monotonic() < deadline_s, f"{taken} requests were accepted"
            info = control.server_info()
            taken = info.finished_requests + info.running_completions + info.queued_completions


def test_sigterm_under_load_loses_no_accepted_request(tokenizer_dir: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ECHO_SERVER), str(tokenizer_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            control = server.stdout.readline().removeprefix("ControlService on ").strip()
            ready = server.stdout.readline()
            assert ready.startswith("Daemon start success! echo is served on 127.0.0.1:")
            with Client(ready.split(" on ")[1].split()[0], timeout_s=30) as client:
                streams = [client.generate_stream("ab", max_tokens=60) for _ in range(12)]  # 4 run, 8 wait
                next(streams[0])
                next(streams[3])
                until_accepted(control, 12)
                server.send_signal(signal.SIGTERM)
                for stream in streams:
                    for _ in stream:
                        pass
                assert [stream.result and stream.result.text for stream in streams] == ["ab" * 30] * 12
            assert server.wait(20) == 0
            assert server.stdout.read().splitlines()[-1] == "Stopped"
        finally:
            server.kill()


@pytest.mark.parametrize(
    "name", ["max_seq_len", "max_batch_size", "num_blocks", "block_size", "max_loras", "max_lora_rank"]
)
def test_the_sizes_of_the_engine_are_flags(name: str, tmp_path: Path) -> None:
    arguments = build_parser().parse_args(["start", "--model", str(tmp_path), f"--{name}", "24"])
    assert getattr(read_settings(arguments).options.engine, name) == 24
