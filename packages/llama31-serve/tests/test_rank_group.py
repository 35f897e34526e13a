"""Ranks as one process: what they are started with, and that they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llama31_serve import UnavailableError, rank_group
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.supervisor import start_command

Serve = Any
# Notes its process; rank 0 lets the others end when it is told to.
RANK = """
    import os, pathlib, signal, sys, time
    here, name = pathlib.Path(sys.argv[1]), os.environ["MS_ROLE"] + os.environ["RANK_ID"]
    if name == "MS_WORKER0":
        signal.signal(signal.SIGTERM, lambda *_: (here / "farewell").touch())
    (here / name).write_text(str(os.getpid()))
    while not (here / "farewell").exists():
        time.sleep(0.01)
"""
NAMES = ("MS_WORKER0", "MS_WORKER1", "MS_SCHED0")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def started(directory: Path) -> dict[str, int]:
    """The processes, when all are there."""
    for _ in range(1000):
        notes = {name: directory / name for name in NAMES}
        if all(note.exists() and note.read_text() for note in notes.values()):
            return {name: int(note.read_text()) for name, note in notes.items()}
        time.sleep(0.01)
    raise AssertionError(list(directory.iterdir()))


@pytest.mark.parametrize("killed", [None, *NAMES])
def test_all_end_with_one(tmp_path: Path, killed: str | None) -> None:
    stop, codes = threading.Event(), []
    command = [sys.executable, "-c", textwrap.dedent(RANK), str(tmp_path)]
    roles = rank_group.environments(2, 1234)
    # The kernel's signal at a parent's end is for the end of the thread that started the child: it stays alive here.
    group = threading.Thread(target=lambda: codes.append(rank_group.run(command, roles, stop)))
    group.start()
    pids = started(tmp_path)
    if killed is None:
        stop.set()
    else:
        os.kill(pids[killed], signal.SIGKILL)
    group.join(20)
    assert codes == [int(killed is not None)]
    assert not any(is_running(pid) for pid in pids.values())


def test_a_group_that_is_killed_leaves_no_ranks(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys, threading
        from llama31_serve import rank_group
        rank_group.run([sys.executable, "-c", {textwrap.dedent(RANK)!r}, {str(tmp_path)!r}],
                       rank_group.environments(2, 1234), threading.Event())
    """)
    with subprocess.Popen([sys.executable, "-c", program]) as group:
        pids = started(tmp_path)
        group.kill()
    for _ in range(500):
        if not any(is_running(pid) for pid in pids.values()):
            return
        time.sleep(0.01)
    raise AssertionError(pids)


def test_command_of_a_replica() -> None:
    assert start_command(["--model", "m"], 1, 3)[1:] == [
        "-m", "llama31_serve.rank_group", "3", "--model", "m", "--replica", "1",
    ]  # fmt: skip


async def test_a_lost_rank_fails_requests_and_health(serve: Serve) -> None:
    """As rank 0 hears of it, from the thread that reads from the lost one."""
    async with serve(EchoEngine(vocab_size=259, step_s=0.005), max_running=1) as running:
        server = running.server
        async with grpc.aio.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            streams = [running.client.generate_stream("ab", max_tokens=4000)]
            await anext(streams[0])
            streams.append(running.client.generate_stream("ab", max_tokens=4000))  # which waits
            await running.until(lambda: server.admission.num_held == 2)
            threading.Thread(target=server.lose_engine, args=("rank 2 has ended",)).start()
            await server.wait_broken()
            assert server.failure == "rank 2 has ended"
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            for stream in streams:
                with pytest.raises(UnavailableError, match="rank 2 has ended; try another replica"):
                    async for _ in stream:
                        pass
            with pytest.raises(UnavailableError, match="the engine has failed"):
                await running.client.generate("ab", max_tokens=1)
            watch.cancel()
