"""What tools/msrun_launcher.sh runs: msrun, and the watch over its ranks.

msrun alone ends the ranks that are left a second after one has died, and then waits for its scheduler, which may take
minutes, without a word on who died. Here every rank is started through `rank`, which notes how its program ended;
`launch` reads the first such note, ends all that is left and says which rank it was and where its log is. Should one of
these processes itself be killed, the kernel kills what it started, and `launch` names the rank whose watcher is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

FAILURE_NAME = ".first_failure"
RUNNING_NAME = ".running_on_node_{}_{}"
LAUNCHER_LOG = "launcher.log"
LOCK_NAME = ".launcher_of_node_{}"
_MSRUN = "mindspore.parallel.cluster.run"  # the module of the command msrun
_POLL_S = 0.2
_GRACE_S = 3.0
_STOP_S = 300.0  # for what a rank writes after SIGTERM; what sent it may be less patient
_LOG_TAIL_LINES = 5
_HEARTBEAT_S = "10"  # that a rank of another node may be silent for; MindSpore waits 30 unless it is told
_WATCHER_GONE = 0  # in place of an exit code
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None)


def main(argv: Sequence[str] | None = None) -> int:
    """Launch a job, or be one rank of it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["rank"]:
        return run_rank(Path(arguments[1]), int(arguments[2]), arguments[3:])
    return launch(_build_parser().parse_args(arguments))


def run_rank(log_dir: Path, node_rank: int, program: list[str]) -> int:
    """Run the program; if it fails, note which rank that was, unless another has failed before."""
    if node_rank > 0 and os.environ.get("MS_ROLE") == "MS_SCHED":
        return (
            0  # msrun starts one on every node that has the master's address; where nodes share a host, node 0's serves
        )
    _signal_with_parent(signal.SIGKILL)
    name = "the scheduler" if os.environ.get("MS_ROLE") == "MS_SCHED" else f"rank {os.environ.get('RANK_ID')}"
    running = log_dir / RUNNING_NAME.format(node_rank, name.replace(" ", "_"))
    running.write_text(f"{name}\n{os.getpid()}\n")
    code = subprocess.call(program, preexec_fn=lambda: _signal_with_parent(signal.SIGKILL))
    if code != 0:
        _note_failure(log_dir, name, code)
    running.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def _note_failure(log_dir: Path, name: str, code: int) -> None:
    try:
        with open(log_dir / FAILURE_NAME, "x") as file:
            file.write(f"{name}\n{code}\n")
    except FileExistsError:
        pass


def launch(arguments: argparse.Namespace) -> int:
    """Check what was asked for, start msrun and watch it: here if `--join`, else in a process of its own."""
    problem = find_problem(arguments)
    if problem:
        print(f"msrun_launcher.sh: error: {problem}", file=sys.stderr)
        return 2
    log_dir: Path = arguments.log_dir
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        holder = _lock(log_dir / LOCK_NAME.format(arguments.node_rank))
        if holder:
            print(
                f"msrun_launcher.sh: error: LOG_DIR {log_dir} is that of a job that runs, process {holder}; end it, or "
                "give another LOG_DIR and another port",
                file=sys.stderr,
            )
            return 2
        for old in [log_dir / FAILURE_NAME, *log_dir.glob(RUNNING_NAME.format(arguments.node_rank, "*"))]:
            old.unlink(missing_ok=True)
    except OSError as error:
        print(f"msrun_launcher.sh: error: LOG_DIR {log_dir} cannot be used: {error.strerror}", file=sys.stderr)
        return 2
    command = msrun_command(arguments)
    print(f"Running Command: {' '.join(command)}\nPlease check log files in {log_dir.absolute()}", flush=True)
    if not arguments.join:
        log = log_dir / LAUNCHER_LOG
        pid = _go_into_background(log)
        if pid:
            print(f"In the background as process {pid}; how it ends is written to {log}", flush=True)
            return 0
    return watch(command, arguments)


def _lock(path: Path) -> str:
    """Hold a file until this process, and a fork of it, has ended; gives the process that holds it if another does."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)  # the lock goes when nobody has it open, so it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(file, 20).decode() or "that is just beginning"
    except OSError:  # a file system without locks
        pass
    return ""


def _go_into_background(log: Path) -> int:
    """Fork; gives the new process's number, and 0 in it, which is in a session of its own and writes to the log."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with log.open("w") as output, open(os.devnull) as nothing:
            for number, file in enumerate((nothing, output, output)):
                os.dup2(file.fileno(), number)
    return pid


def find_problem(arguments: argparse.Namespace) -> str | None:
    """What makes it impossible to start, in one sentence; None if nothing does."""
    total, local, node = arguments.worker_num, arguments.local_worker_num, arguments.node_rank
    if total < 1 or local < 1 or total % local:
        return f"WORKER_NUM is {total} and LOCAL_WORKER {local}; every node runs LOCAL_WORKER of the WORKER_NUM ranks"
    if not 0 <= node < total // local:
        return f"NODE_RANK is {node}; {total} ranks, {local} a node, make nodes 0 to {total // local - 1}"
    if not 1024 <= arguments.master_port <= 65535:
        return f"MASTER_PORT is {arguments.master_port}, allowed is 1024 to 65535"
    if not arguments.program:
        return "no program is given; the first argument is its command line"
    if not Path(arguments.program[0]).is_file() and shutil.which(arguments.program[0]) is None:
        return f"there is no program {arguments.program[0]!r} in {Path.cwd()}"
    if importlib.util.find_spec("mindspore") is None:
        return f"{sys.executable} has no MindSpore, which msrun comes with: pip install llama31-core, or set PYTHON"
    if node == 0 and _is_elsewhere(arguments.master_addr):
        return (
            f"MASTER_ADDR {arguments.master_addr} is no address of this machine, and NODE_RANK 0 says that it is; give "
            "the other machine NODE_RANK 0, or one of this machine's addresses"
        )
    if node == 0 and _is_taken(arguments.master_port):
        return f"MASTER_PORT {arguments.master_port} is in use on this machine; end the other job, or give another port"
    return None


def msrun_command(arguments: argparse.Namespace) -> list[str]:
    """The command line of msrun, every rank wrapped in `rank`."""
    program = arguments.program
    if program[0].endswith(".py"):
        program = [sys.executable, "-u", *program]
    wrapped = [__file__, "rank", str(arguments.log_dir.absolute()), str(arguments.node_rank), *program]
    return [sys.executable, "-m", _MSRUN, *_flags(arguments, join=True), *wrapped]


def watch(command: list[str], arguments: argparse.Namespace) -> int:
    """Run msrun to its end, or to that of the first rank that fails; 0, 1, or 130 after an interruption.

    SIGTERM is handed to the ranks alone, so that a training job writes its checkpoint and ends with 0; a second signal,
    or a rank that takes it for its end, ends the rest.
    """
    log_dir: Path = arguments.log_dir
    node_rank: int = arguments.node_rank
    (log_dir / LOCK_NAME.format(node_rank)).write_text(str(os.getpid()))
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    # msrun starts Python programs with the `python` that it finds.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    env = {"MS_NODE_TIMEOUT": _HEARTBEAT_S, **os.environ, "PATH": path}
    job = subprocess.Popen(
        command,
        start_new_session=True,
        env=env,
        preexec_fn=lambda: _signal_with_parent(signal.SIGINT),  # at which msrun ends all that it has started
    )
    failure = log_dir / FAILURE_NAME
    processes: set[int] = set()
    asked_at = 0.0
    while job.poll() is None and not failure.exists():
        if signals == [signal.SIGTERM]:
            if not asked_at:
                asked_at = time.monotonic()
                _terminate_programs(log_dir, node_rank)
            elif time.monotonic() - asked_at > _STOP_S:
                break
        elif signals:
            break
        processes |= _descendants(job.pid)
        for lost in lost_watchers(log_dir, node_rank):
            _note_failure(log_dir, lost, _WATCHER_GONE)
        time.sleep(_POLL_S)
    if job.poll() == 0 and not failure.exists():
        if signals:
            print("msrun_launcher.sh: after SIGTERM all ranks of this node have ended by themselves", file=sys.stderr)
        return 0
    _end(job, processes | _descendants(job.pid))
    if signals:
        print("msrun_launcher.sh: interrupted; all ranks of this node are ended", file=sys.stderr)
        return 130
    print(f"msrun_launcher.sh: error: {describe_failure(log_dir)}", file=sys.stderr)
    if node_rank == 0:
        scheduler_log = log_dir / "scheduler.log"
        if absent := never_came(scheduler_log, arguments.worker_num):
            print(
                f"msrun_launcher.sh: error: of {arguments.worker_num} ranks these never came: {absent}", file=sys.stderr
            )
        if silent := fell_silent(scheduler_log, arguments.local_worker_num):
            print(
                f"msrun_launcher.sh: error: ranks of other nodes that fell silent first: {silent}; their nodes' logs "
                "say why",
                file=sys.stderr,
            )
    return 1


def lost_watchers(log_dir: Path, node_rank: int) -> list[str]:
    """The ranks whose `rank` process is gone without having taken its note away."""
    return [name for name, pid, note in _watchers(log_dir, node_rank) if not _is_running(pid) and note.exists()]


def _watchers(log_dir: Path, node_rank: int) -> list[tuple[str, int, Path]]:
    """Of each rank its name, its `rank` process and the note of that."""
    found = []
    for note in log_dir.glob(RUNNING_NAME.format(node_rank, "*")):
        try:
            name, pid = note.read_text().splitlines()
        except (OSError, ValueError):
            continue  # it has just ended, or just begins
        found.append((name, int(pid), note))
    return found


def _terminate_programs(log_dir: Path, node_rank: int) -> None:
    """Send SIGTERM to the program of each rank; the scheduler goes when the ranks have gone."""
    for name, watcher, _ in _watchers(log_dir, node_rank):
        if name != "the scheduler":
            _signal_all(_children(watcher), signal.SIGTERM)


def describe_failure(log_dir: Path) -> str:
    """Who failed, how, where its log is, and the end of that."""
    try:
        who, code_text = (log_dir / FAILURE_NAME).read_text().splitlines()
    except (OSError, ValueError):
        return f"msrun ended before its ranks did; see {log_dir}"
    code = int(code_text)
    if code == _WATCHER_GONE:
        how = "has lost the process that watched it, which was killed"
    else:
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    log = log_dir / ("scheduler.log" if who == "the scheduler" else f"worker_{who.split()[-1]}.log")
    tail = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:] if log.is_file() else []
    said = "".join(f"\n  | {line}" for line in tail)
    return f"{who} {how}, the other ranks of this node have been ended; its log is {log}{said}"


def never_came(scheduler_log: Path, worker_num: int) -> str:
    """The ranks that a job waited for in vain: those that the scheduler's log, which node 0 has, does not name."""
    text = scheduler_log.read_text(errors="replace") if scheduler_log.is_file() else ""
    came = {int(rank) for rank in re.findall(r"The new node: (\d+)\(role: MS_WORKER\)", text)}
    if not came or "Cluster is successfully initialized" in text:
        return ""
    return _listed([rank for rank in range(worker_num) if rank not in came])


def fell_silent(scheduler_log: Path, local_worker_num: int) -> str:
    """The ranks of other nodes than node 0 whose heartbeat the scheduler missed."""
    text = scheduler_log.read_text(errors="replace") if scheduler_log.is_file() else ""
    ranks = {int(rank) for rank in re.findall(r"The node: (\d+) is timed out", text)}
    return _listed(sorted(rank for rank in ranks if rank >= local_worker_num))


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:10])) + (f" and {len(ranks) - 10} more" if len(ranks) > 10 else "")


def _signal_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it ends, however that was."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def _end(job: subprocess.Popen[bytes], processes: set[int]) -> None:
    """End msrun and all it started: politely, then at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_all(processes | {job.pid}, number)
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(_is_running(pid) for pid in processes):
            job.poll()
            time.sleep(_POLL_S)
        if not any(_is_running(pid) for pid in processes):
            break
    job.kill()
    job.wait()


def _signal_all(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _children(pid: int) -> set[int]:
    try:
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return set()


def _descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that they have."""
    found = _children(pid)
    for child in tuple(found):
        found |= _descendants(child)
    return found


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _is_elsewhere(address: str) -> bool:
    """Whether an address or name belongs to another machine for sure, or to none."""
    try:
        found = socket.getaddrinfo(address.strip("[]"), 0, type=socket.SOCK_DGRAM)
    except OSError:
        return True
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                continue
        return False
    return True


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _flags(arguments: argparse.Namespace, *, join: bool) -> list[str]:
    names = ("worker_num", "local_worker_num", "master_addr", "master_port", "node_rank", "log_dir", "cluster_time_out")
    return [f"--{name}={getattr(arguments, name)}" for name in names] + [f"--join={join}"]


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msrun_launcher.sh", usage="see tools/msrun_launcher.sh", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    launcher = commands.add_parser("launch", prog="msrun_launcher.sh", allow_abbrev=False)
    for name in ("worker_num", "local_worker_num", "master_port", "node_rank", "cluster_time_out"):
        launcher.add_argument(f"--{name}", type=int, required=True)
    launcher.add_argument("--master_addr", required=True)
    launcher.add_argument("--log_dir", type=Path, required=True)
    launcher.add_argument("--join", type=_as_bool, required=True)
    launcher.add_argument("program", nargs="+")
    return parser


if __name__ == "__main__":
    sys.exit(main())
