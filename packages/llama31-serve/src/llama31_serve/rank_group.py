"""A model over several processes of this machine, as one process to whoever supervises it.

`python -m llama31_serve.rank_group N START_FLAGS` starts MindSpore's scheduler and N ranks of `llama31-serve start`,
with the environment that msrun would give them. Rank 0 serves. If one of them fails, all are ended and the exit code is
1; SIGTERM drains rank 0, which lets the others end, exit 0. Should this process be killed, the kernel kills the ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

HOST = "127.0.0.1"
POLL_S = 0.05
FAREWELL_S, LAST_WORDS_S = 30.0, 2.0
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None)


def environments(count: int, port: int) -> list[dict[str, str]]:
    """What msrun adds to the environment of each rank; the last one is the scheduler's."""
    shared = {"MS_WORKER_NUM": str(count), "MS_SCHED_HOST": HOST, "MS_SCHED_PORT": str(port), "MS_TOPO_TIMEOUT": "600"}
    if "GLOG_v" not in os.environ:
        shared["GLOG_v"] = "3"  # MindSpore's errors alone: all ranks write to one terminal
    ranks = [
        {**shared, "MS_ROLE": "MS_WORKER", "MS_NODE_ID": name, "RANK_ID": name, "DEVICE_ID": name, "RANK_SIZE": total}
        for total in [str(count)]
        for name in map(str, range(count))
    ]
    return [*ranks, {**shared, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}]


def run(command: Sequence[str], roles: Sequence[Mapping[str, str]], stop: threading.Event) -> int:
    """Run a command in every role until all have ended; 0, or 1 if one failed.

    Args:
        command: of every process.
        roles: what each of them has in its environment beside this process's; the first one is asked to stop.
        stop: set to ask for the end.
    """
    processes = [_start(command, role, is_first=index == 0) for index, role in enumerate(roles)]
    first = processes[0]
    try:
        while first.poll() is None and not _failed(processes):
            if stop.wait(POLL_S):
                first.send_signal(signal.SIGTERM)
                stop.clear()
        failed = _failed(processes)
        # After a failure rank 0 has a moment to tell its clients; otherwise it has let the others end.
        _wait([first] if failed else processes, LAST_WORDS_S if failed else FAREWELL_S)
        return int(failed)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(command: Sequence[str], role: Mapping[str, str], *, is_first: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, **role},
        stdin=subprocess.DEVNULL,
        stdout=None if is_first else subprocess.DEVNULL,
        preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() not in (None, 0) for process in processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Until all have ended by themselves, or for so long."""
    ends_s = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < ends_s:
        time.sleep(POLL_S)


def main(argv: Sequence[str]) -> int:
    """Be the group of `llama31-serve start` with these flags; the first argument is the number of ranks."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "llama31_serve", "start", *argv[1:]]
    return run(command, environments(int(argv[0]), port), stop)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
