"""A model over three processes behind one server: a rank that is killed ends the server, its clients are told, and
under `llama31-serve replicas` all come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llama31_serve import Client, UnavailableError

LAUNCHER = Path(__file__).resolve().parents[1] / "tools" / "msrun_launcher.sh"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
RANKS = 3  # SmolLM2 has three heads for keys and values


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def launched(smollm2_dir: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    program = tmp_path / "serve.py"
    program.write_text("from llama31_serve.cli import main\nraise SystemExit(main())\n")
    port, meeting = free_port(), free_port()
    order = f"{program} start --model {smollm2_dir} --tensor_parallel {RANKS} --max_seq_len 256 --port {port}"
    command = ["bash", str(LAUNCHER), order, str(RANKS), str(meeting), "log", "True", "600"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True) as launcher:
        try:
            yield f"127.0.0.1:{port}", launcher
        finally:
            launcher.terminate()


def rank_process(rank: int, directory: Path) -> int:
    """The process of a rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"RANK_ID={rank}".encode() in environment and (entry / "cwd").resolve().is_relative_to(directory):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_ranks_without_a_launcher_are_refused(smollm2_dir: Path) -> None:
    order = ["start", "--model", str(smollm2_dir), "--tensor_parallel", str(RANKS), "--port", str(free_port())]
    command = [sys.executable, "-m", "llama31_serve", *order]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "--tensor_parallel" in ended.stderr
    assert "no launcher started this one" in ended.stderr


@pytest.mark.slow
def test_three_ranks_answer_as_one_and_end_together(
    launched: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    address, launcher = launched
    with Client(address, timeout_s=300, max_attempts=1) as client:
        client.wait_until_serving(400)
        assert client.chat(QUESTION, temperature=0).text == "The capital of France is Paris."
        os.kill(rank_process(RANKS - 1, tmp_path), signal.SIGKILL)
        launcher.wait(60)
        with pytest.raises(UnavailableError):
            client.chat(QUESTION, temperature=0)
    assert launcher.returncode != 0


@pytest.mark.slow
def test_a_killed_rank_comes_back_with_all_others(smollm2_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ["--model", str(smollm2_dir), "--tensor_parallel", str(RANKS), "--max_seq_len", "256", "--port", str(port)]
    command = [sys.executable, "-m", "llama31_serve", "replicas", "--count", "1", "--", *flags]
    seen: list[int] = []

    def watch() -> None:
        """Every state of health, until the server is gone."""
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                    seen.append(answer.status)
            except grpc.RpcError:
                return

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as replicas:
        try:
            with Client(f"127.0.0.1:{port}", timeout_s=300, max_attempts=1) as client:
                client.wait_until_serving(400)
                assert client.chat(QUESTION, temperature=0).text == "The capital of France is Paris."
                watching = threading.Thread(target=watch)
                watching.start()
                with client.generate_stream("Once", max_tokens=200, ignore_eos=True) as stream:
                    next(stream)
                    os.kill(rank_process(RANKS - 1, tmp_path), signal.SIGKILL)
                    with pytest.raises(UnavailableError, match="rank 2 has ended"):
                        for _ in stream:
                            pass
                watching.join(30)
                serving, not_serving = (
                    health_pb2.HealthCheckResponse.SERVING,
                    health_pb2.HealthCheckResponse.NOT_SERVING,
                )
                assert seen == [serving, not_serving]
                client.wait_until_serving(400)
                assert client.chat(QUESTION, temperature=0).text == "The capital of France is Paris."
            replicas.terminate()
            assert replicas.wait(60) == 0
        finally:
            replicas.terminate()
