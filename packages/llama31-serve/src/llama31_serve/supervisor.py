"""Keeps several server processes going: starts them, starts those again that die, ends them together."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

READY_WORDS, SERVED_ON = "Daemon start success!", " is served on "
HEALTHY_AFTER_S, MAX_QUICK_DEATHS, MAX_PAUSE_S = 30.0, 5, 30.0
POLL_S, KILL_AFTER_S = 0.1, 90.0


@dataclass
class _Replica:
    number: int
    command: Sequence[str]
    process: subprocess.Popen[str] | None = None
    address: str | None = None
    serving_since_s: float | None = None
    start_again_s: float = 0.0
    quick_deaths: int = 0
    finished: bool = False


class Supervisor:
    """Runs commands until they end by themselves, or until `stop`.

    A process that dies is started again, after a pause that doubles each time it dies before it has served for
    HEALTHY_AFTER_S, however long it took to load. After MAX_QUICK_DEATHS such deaths in a row it will not get better:
    all are ended.

    Args:
        commands: of the processes; each prints what `llama31-serve start` prints.
        say: prints a line.
        drain_timeout_s: how long a process may drain; one that is still there KILL_AFTER_S later is killed.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], say: Callable[[str], None] = print, drain_timeout_s: float = 0.0
    ) -> None:
        self._replicas = [_Replica(number, command) for number, command in enumerate(commands)]
        self._say = say
        self._kill_after_s = drain_timeout_s + KILL_AFTER_S
        self._stopping = threading.Event()
        self._told = False

    def stop(self) -> None:
        """Ask every process to drain and end; may be called from a signal handler."""
        self._stopping.set()

    def run(self) -> int:
        """Returns when no process is left: 0, or 1 if one could not be kept going."""
        failed = False
        asked_s: float | None = None
        for replica in self._replicas:
            self._start(replica)
        while not all(replica.finished for replica in self._replicas):
            self._stopping.wait(POLL_S)
            if self._stopping.is_set():
                asked_s = asked_s or self._ask_to_end()
                time.sleep(POLL_S)
            for replica in self._replicas:
                failed |= self._look_after(replica)
            if asked_s is not None and time.monotonic() - asked_s > self._kill_after_s:
                self._signal(signal.SIGKILL)
            self._tell_when_all_serve()
        return int(failed)

    def _start(self, replica: _Replica) -> None:
        replica.address = replica.serving_since_s = None
        # A session of its own: Ctrl-C reaches the supervisor alone, which asks each process once.
        replica.process = subprocess.Popen(
            replica.command, stdout=subprocess.PIPE, text=True, start_new_session=True, stdin=subprocess.DEVNULL
        )
        reader = threading.Thread(target=self._read, args=(replica, replica.process), daemon=True)
        reader.start()

    def _read(self, replica: _Replica, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(f"[{replica.number}] {line.rstrip()}")
            if line.startswith(READY_WORDS):
                replica.address = line.partition(SERVED_ON)[2].split()[0]
                replica.serving_since_s = time.monotonic()

    def _look_after(self, replica: _Replica) -> bool:
        """Start a process again if it died; True if it is beyond help."""
        if replica.finished:
            return False
        now_s = time.monotonic()
        if replica.process is None:
            if self._stopping.is_set():
                replica.finished = True
            elif now_s >= replica.start_again_s:
                self._start(replica)
            return False
        code = replica.process.poll()
        if code is None:
            return False
        replica.process = replica.address = None
        if code == 0 or self._stopping.is_set():
            replica.finished = True
            return code not in (0, -signal.SIGTERM)
        since_s = replica.serving_since_s
        died_young = since_s is None or now_s - since_s < HEALTHY_AFTER_S
        replica.quick_deaths = replica.quick_deaths + 1 if died_young else 0
        if replica.quick_deaths >= MAX_QUICK_DEATHS:
            self._say(f"[{replica.number}] ended with {code}, {MAX_QUICK_DEATHS} times in a row; all are stopped")
            replica.finished = True
            self.stop()
            return True
        pause_s = min(2.0**replica.quick_deaths / 2, MAX_PAUSE_S)
        self._say(f"[{replica.number}] ended with {code}; it is started again in {pause_s:g} s")
        replica.start_again_s = now_s + pause_s
        return False

    def _tell_when_all_serve(self) -> None:
        addresses = [replica.address for replica in self._replicas if replica.address is not None]
        if not self._told and len(addresses) == len(self._replicas):
            self._told = True
            self._say(f"All {len(addresses)} serve: ipv4:{','.join(addresses)}")

    def _ask_to_end(self) -> float:
        self._signal(signal.SIGTERM)
        return time.monotonic()

    def _signal(self, number: signal.Signals) -> None:
        for replica in self._replicas:
            if replica.process is not None and replica.process.poll() is None:
                replica.process.send_signal(number)


def start_command(flags: Sequence[str], replica: int, num_ranks: int = 1) -> list[str]:
    """`llama31-serve start` as number `replica` of several, each a process or a group of ranks."""
    what = ("llama31_serve", "start") if num_ranks == 1 else ("llama31_serve.rank_group", str(num_ranks))
    return [sys.executable, "-m", *what, *flags, "--replica", str(replica)]
