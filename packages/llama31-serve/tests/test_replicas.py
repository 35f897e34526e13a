"""Several servers under one supervisor: calls go round them, one that is killed comes back, all end together."""

from __future__ import annotations

import io
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama31_serve import Client
from llama31_serve.cli import build_parser, main
from llama31_serve.commands.replicas import plan_processes, read_start_flags, say
from llama31_serve.errors import StartError
from llama31_serve.server.start_settings import read_settings
from llama31_serve.supervisor import Supervisor, start_command

ECHO_SERVER = """
    import asyncio, os, sys
    from pathlib import Path
    from llama31_serve.commands.start import serve_until_signal
    from llama31_serve.server.app import Server
    from llama31_serve.server.echo_engine import EchoEngine
    from llama31_serve.server.model_text import load_text
    from llama31_serve.server.options import ServerOptions

    print("pid", os.getpid(), flush=True)

    async def run():
        options = ServerOptions(port=0, model_name="echo-" + sys.argv[2])
        server = Server(options, lambda: load_text(Path(sys.argv[1])), lambda: EchoEngine(vocab_size=259))
        return await serve_until_signal(server)

    raise SystemExit(asyncio.run(run()))
"""


class Running:
    """A supervisor on a thread, and what it said."""

    def __init__(self, commands: Sequence[Sequence[str]], drain_timeout_s: float = 0.0) -> None:
        self.lines: list[str] = []
        self.supervisor = Supervisor(commands, self.lines.append, drain_timeout_s)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.supervisor.run()

    def until(self, start: str, count: int = 1, timeout_s: float = 120.0) -> str:
        """The last line that begins so, when there are as many."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            found = [line for line in list(self.lines) if line.startswith(start)]
            if len(found) >= count:
                return found[-1]
            time.sleep(0.02)
        raise AssertionError(self.lines)

    def end(self) -> None:
        """Wait for the end."""
        self.supervisor.stop()
        self._thread.join(120)
        assert not self._thread.is_alive()


@contextmanager
def supervised(commands: Sequence[Sequence[str]]) -> Iterator[Running]:
    running = Running(commands)
    try:
        yield running
    finally:
        running.end()


def test_calls_go_round_and_a_killed_server_comes_back(tokenizer_dir: Path) -> None:
    program = textwrap.dedent(ECHO_SERVER)
    commands = [[sys.executable, "-c", program, str(tokenizer_dir), str(number)] for number in range(2)]
    with supervised(commands) as running:
        target = running.until("All 2 serve: ").removeprefix("All 2 serve: ")
        assert target.startswith("ipv4:127.0.0.1:")
        with Client(target, timeout_s=20) as client:
            assert {client.model_info().model_name for _ in range(12)} == {"echo-0", "echo-1"}
            os.kill(int(running.until("[1] pid ").split()[-1]), signal.SIGKILL)
            for _ in range(20):  # the other one answers meanwhile
                assert client.generate("ab", max_tokens=2).text == "ab"
        running.until("[1] ended with -9; it is started again in 1 s")
        running.until("[1] Daemon start success!", 2)
    assert running.code == 0
    assert len([line for line in running.lines if line.endswith("] Stopped")]) == 2


def test_one_that_cannot_live_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that it takes to load does not count as health."""
    monkeypatch.setattr("llama31_serve.supervisor.MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("llama31_serve.supervisor.HEALTHY_AFTER_S", 0.0)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with supervised([sleeper, [sys.executable, "-c", "raise SystemExit(3)"]]) as running:
        running.until("[1] ended with 3, 5 times in a row; all are stopped")
        running.end()
    assert running.code == 1


def test_one_that_drains_is_given_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama31_serve.supervisor.KILL_AFTER_S", 0.0)
    program = "import signal, time; signal.signal(15, lambda *_: exit(time.sleep(0.4))); print('up', flush=True); "
    running = Running([[sys.executable, "-c", program + "time.sleep(60)"]], drain_timeout_s=30)
    running.until("[0] up")
    running.end()
    assert running.code == 0


def test_servers_that_end_by_themselves_are_left_alone() -> None:
    with supervised([[sys.executable, "-c", "print('done')"]]) as running:
        running.until("[0] done")
        running._thread.join(10)
        assert running.code == 0
    assert len(running.lines) == 1


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert start_command(["--model", "m"], 2)[-5:] == ["start", "--model", "m", "--replica", "2"]
    for argv, message in (
        (["replicas", "--", "--model", "m"], "how many? give --count"),
        (["replicas", "--count", "0", "--", "--model", "m"], "--count is 0"),
        (["replicas", "--count", "1", "--", "--model", "m", "--tensor_parallel", "0"], "--tensor_parallel is 0"),
        (["replicas", "--", "--config", str(tmp_path / "none")], "modelInstanceNumber and ModelDeployConfig"),
    ):
        assert main(argv) == 1
        assert message in capsys.readouterr().err


def test_numbers_of_processes(tmp_path: Path) -> None:
    def plan(count: int | None, *flags: str) -> tuple[int, int]:
        return plan_processes(count, read_start_flags(flags))

    assert plan(2, "--model", "m") == (2, 1)
    assert plan(2, "--model", "m", "--tensor_parallel", "3") == (2, 3)
    config = tmp_path / "config.json"
    config.write_text(
        '{"BackendConfig": {"modelInstanceNumber": 4, "ModelDeployConfig": {"ModelConfig": [{"worldSize": 2}]}}}'
    )
    assert plan(None, f"--config={config}") == (4, 2)
    assert plan(1, "--tensor_parallel", "3", "--config", str(config)) == (1, 3)
    assert plan(1, "--config", str(config)) == (1, 2)
    config.write_text('{"BackendConfig": {"ModelDeployConfig": {"ModelConfig": [{"worldSize": "2"}]}}}')
    with pytest.raises(StartError, match="worldSize is '2', expected a number"):
        plan(1, "--config", str(config))


class Unread(io.StringIO):
    """Standard output whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_servers_go_on_when_nobody_reads_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Unread())
    say("All 2 serve")


def test_ports_are_raised(tmp_path: Path) -> None:
    flags = f"--model {tmp_path} --port 50051 --http_port 0 --metrics_port 1027 --replica 2".split()
    options = read_settings(build_parser().parse_args(["start", *flags])).options
    assert (options.port, options.http_port, options.metrics_port, options.control_port) == (50053, 0, 1029, None)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tensor_parallel", "0"], "--tensor_parallel is 0, allowed are numbers from 1 up"),
        (["--model_name", ""], "--model_name is empty"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: list[str], problem: str) -> None:
    with pytest.raises(StartError, match=problem):
        read_settings(read_start_flags(["--model", "somewhere", *flags]))
