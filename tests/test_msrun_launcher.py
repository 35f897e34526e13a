"""`tools/msrun_launcher.sh`: the old argument orders, a job of ranks that talk to each other, and ranks that die."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msrun_supervisor import never_came

LAUNCHER = Path(__file__).resolve().parents[1] / "tools" / "msrun_launcher.sh"
TIMEOUT_S = 120
# What a rank does is said by its first argument, and the second names a file that a rank waits for before it dies.
# Ranks but no MindSpore: what is tested is the launching.
PROGRAM = """
import os, signal, sys, time
rank, role = os.environ.get("RANK_ID"), os.environ["MS_ROLE"]
print("rank", rank, "of", os.environ["MS_WORKER_NUM"], sys.argv[1:], flush=True)
if role == "MS_WORKER" and rank == "1" and sys.argv[1] in ("raise", "killed"):
    waited_until = time.monotonic() + 60
    while sys.argv[2:] and not os.path.exists(sys.argv[2]) and time.monotonic() < waited_until:
        time.sleep(0.05)
    if sys.argv[1] == "raise":
        raise ValueError("the second rank's own error")
    os.kill(os.getpid(), 9)
if sys.argv[1] == "stop" and role == "MS_WORKER":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("checkpoint written", flush=True)))
    print("ready", flush=True)
    time.sleep(300)
if sys.argv[1] not in ("end", "stop"):
    time.sleep(300)
"""
SUM_PROGRAM = """
import sys, time
import numpy as np
import mindspore as ms
from mindspore import Tensor, ops
from mindspore.communication import get_rank, init
ms.set_device("CPU")
init("mccl")
add_up = ops.AllReduce()
print("sum", add_up(Tensor(np.float32(get_rank() + 1))).asnumpy(), flush=True)
while sys.argv[1:] == ["forever"]:
    add_up(Tensor(np.float32(1))).asnumpy()
    time.sleep(0.05)
"""


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sum.py").write_text(SUM_PROGRAM)
    return tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def start(work_dir: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **extra}
    return subprocess.Popen(
        ["bash", str(LAUNCHER), *arguments],
        cwd=work_dir,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(work_dir: Path, *arguments: str, **extra: str) -> tuple[int, str, str]:
    with start(work_dir, *arguments, **extra) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output, errors


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_in(work_dir: Path) -> list[int]:
    """Processes whose working directory is the test's own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == work_dir and is_running(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "8 8 127.0.0.1 8118 0 output/msrun_log_x 7200 False"),
        (["4"], "4 4 127.0.0.1 8118 0 output/msrun_log_x 7200 False"),
        (["4", "9000", "logs", "True", "300"], "4 4 127.0.0.1 9000 0 logs_x 300 True"),
        (["64", "8", "192.168.1.1", "8118", "3", "logs", "False", "300"], "64 8 192.168.1.1 8118 3 logs_x 300 False"),
    ],
)
def test_the_argument_orders(arguments: list[str], expected: str, work_dir: Path) -> None:
    shown = work_dir / "show_arguments"
    shown.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nenv | grep -E "^(LOG_MF|ASCEND_PROCESS_LOG)_PATH="\n')
    shown.chmod(0o755)
    program = 'run.py \\\n --config "a b.yaml" \\\n --predict_data $WORD'
    names = ("worker_num", "local_worker_num", "master_addr", "master_port", "node_rank", "log_dir")
    code, output, errors = run(
        work_dir, program, *arguments, PYTHON=str(shown), MF_LOG_SUFFIX="x", PLOG_REDICT_TO_OUTPUT="True", WORD="w"
    )
    assert code == 0, errors
    lines = output.splitlines()
    values = dict(zip((*names, "cluster_time_out", "join"), expected.split(), strict=True))
    assert set(lines) >= {f"--{name}={value}" for name, value in values.items()}
    assert lines[lines.index("--") + 1 :][:5] == ["run.py", "--config", "a b.yaml", "--predict_data", "w"]
    assert f"LOG_MF_PATH={work_dir}/output/log_x" in lines
    assert f"ASCEND_PROCESS_LOG_PATH={work_dir}/output/plog_x" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "msrun_launcher.sh \"PROGRAM ARGS\" WORKER_NUM"),
        (["program.py", "2", "9000"], "msrun_launcher.sh \"PROGRAM ARGS\" WORKER_NUM"),
        (["nothing.py", "2"], "there is no program 'nothing.py' in"),
        (["program.py", "two"], "invalid int value: 'two'"),
        (["program.py", "0"], "WORKER_NUM is 0"),
        (["program.py", "8", "3", "127.0.0.1", "9000", "0", "logs", "True", "9"], "LOCAL_WORKER 3"),
        (["program.py", "8", "4", "127.0.0.1", "9000", "2", "logs", "True", "9"], "make nodes 0 to 1"),
        (["program.py", "2", "1", "198.51.100.1", "9000", "0", "logs", "True", "9"], "198.51.100.1 is no address"),
        (["program.py", "2", "80", "logs", "True", "9"], "MASTER_PORT is 80, allowed is 1024 to 65535"),
        (["program.py", "2", "9000", "logs", "Maybe", "9"], "'Maybe' is neither True nor False"),
        (["program.py", "2", "9000", "program.py", "True", "9"], "LOG_DIR program.py cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_is_one_message(arguments: list[str], message: str, work_dir: Path) -> None:
    code, _, errors = run(work_dir, *arguments)
    assert code == 2
    assert message in errors


def test_a_port_in_use_is_found_first(work_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        code, _, errors = run(work_dir, "program.py end", "2", port, "logs", "True", "60")
    assert (code, errors.count("\n")) == (2, 1)
    assert f"MASTER_PORT {port} is in use" in errors


def test_a_job_keeps_its_log_directory_to_itself(work_dir: Path) -> None:
    code, output, errors = run(work_dir, "program.py stop", "2", str(free_port()), "logs", "False", "60")
    assert code == 0, errors
    match = re.search(r"In the background as process (\d+)", output)
    assert match
    wait_for_logs(work_dir, "ready")
    for join in ("True", "False"):
        code, _, errors = run(work_dir, "program.py end", "2", str(free_port()), "logs", join, "60")
        assert (code, errors.count("\n")) == (2, 1)
        assert f"LOG_DIR logs is that of a job that runs, process {match[1]}; end it" in errors
    os.kill(int(match[1]), signal.SIGTERM)
    assert ends_in(work_dir, 30)
    assert "all ranks of this node have ended by themselves" in (work_dir / "logs" / "launcher.log").read_text()
    code, _, errors = run(work_dir, "program.py end", "2", str(free_port()), "logs", "True", "60")
    assert code == 0, errors


def test_ranks_that_never_came_are_named(tmp_path: Path) -> None:
    log = tmp_path / "scheduler.log"
    assert never_came(log, 4) == ""
    log.write_text("".join(f"… The new node: {rank}(role: MS_WORKER), rank id: …\n" for rank in (2, 0)))
    assert never_came(log, 4) == "1, 3"
    assert never_came(log, 64).startswith("1, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 52 more")
    log.write_text(log.read_text() + "… BuildCluster] Cluster is successfully initialized.\n")
    assert never_came(log, 4) == ""


@pytest.mark.parametrize(("what", "how"), [("raise", "ended with exit code 1"), ("killed", "was killed by SIGKILL")])
def test_a_dead_rank_ends_the_others_and_is_named(what: str, how: str, work_dir: Path) -> None:
    with start(work_dir, f"program.py {what} now", "3", str(free_port()), "logs", "True", "60") as job:
        assert job.stdout is not None
        assert any("rank 0 of 3" in line for line in job.stdout), "msrun shows the first rank's log"
        (work_dir / "now").touch()
        started = time.monotonic()
        _, errors = job.communicate(timeout=TIMEOUT_S)
        elapsed_s = time.monotonic() - started
    assert job.returncode == 1
    assert f"rank 1 {how}, the other ranks of this node have been ended; its log is logs/worker_1.log" in errors
    assert elapsed_s < 20, f"{elapsed_s} s; msrun alone waits for its scheduler, which sleeps for 300"
    assert processes_in(work_dir) == []
    if what == "raise":
        assert "the second rank's own error" in errors


def test_in_the_background_the_end_is_in_the_launcher_s_log(work_dir: Path) -> None:
    port = str(free_port())
    code, output, errors = run(work_dir, "program.py raise", "2", port, "logs", "False", "60")
    assert code == 0, errors
    match = re.search(r"In the background as process (\d+)", output)
    assert match
    deadline = time.monotonic() + TIMEOUT_S
    while is_running(int(match[1])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "rank 1 ended with exit code 1" in (work_dir / "logs" / "launcher.log").read_text()
    assert processes_in(work_dir) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_ranks_that_do_not_handle_it(number: signal.Signals, work_dir: Path) -> None:
    with start(work_dir, "program.py sleep", "2", str(free_port()), "logs", "True", "60") as job:
        wait_for_logs(work_dir)
        job.send_signal(number)
        _, errors = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 130
    assert "interrupted; all ranks of this node are ended" in errors
    assert processes_in(work_dir) == []


def test_sigterm_lets_ranks_end_by_themselves(work_dir: Path) -> None:
    with start(work_dir, "program.py stop", "2", str(free_port()), "logs", "True", "60") as job:
        wait_for_logs(work_dir, "ready")
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, errors
    assert "after SIGTERM all ranks of this node have ended by themselves" in errors
    for rank in range(2):
        assert "checkpoint written" in (work_dir / "logs" / f"worker_{rank}.log").read_text()
    assert processes_in(work_dir) == []


def wait_for_logs(work_dir: Path, word: str = "rank") -> None:
    """Until both ranks of a job have said something."""
    deadline = time.monotonic() + TIMEOUT_S
    logs = [work_dir / "logs" / f"worker_{rank}.log" for rank in range(2)]
    while not all(log.is_file() and word in log.read_text() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.05)


def ends_in(work_dir: Path, seconds: float) -> bool:
    """Whether nothing of a job is left within so long."""
    deadline = time.monotonic() + seconds
    while processes_in(work_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    return processes_in(work_dir) == []


def test_a_killed_supervisor_takes_all_ranks_with_it(work_dir: Path) -> None:
    """Nobody is left to end them: they must not hold on to their devices."""
    with start(work_dir, "program.py sleep", "2", str(free_port()), "logs", "True", "60") as job:
        wait_for_logs(work_dir)
        assert len(processes_in(work_dir)) > 4
        job.kill()
        job.communicate(timeout=TIMEOUT_S)
    assert ends_in(work_dir, 10)


def test_a_killed_watcher_of_a_rank_ends_the_job_and_the_rank_is_named(work_dir: Path) -> None:
    with start(work_dir, "program.py sleep", "2", str(free_port()), "logs", "True", "60") as job:
        wait_for_logs(work_dir)
        pid = int((work_dir / "logs" / ".running_on_node_0_rank_1").read_text().splitlines()[1])
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        _, errors = job.communicate(timeout=TIMEOUT_S)
        elapsed_s = time.monotonic() - started
    assert job.returncode == 1
    assert "rank 1 has lost the process that watched it, which was killed" in errors
    assert elapsed_s < 20, f"{elapsed_s} s; msrun alone waits for its scheduler, which sleeps for 300"
    assert ends_in(work_dir, 10)


def test_two_nodes_make_one_group(work_dir: Path) -> None:
    """Two launchers on this host, as on two: one rank each, which add up their numbers."""
    port = str(free_port())
    jobs = [
        start(work_dir, "sum.py", "2", "1", "127.0.0.1", port, str(node), f"node{node}", "True", "60")
        for node in range(2)
    ]
    for node, job in enumerate(jobs):
        _, errors = job.communicate(timeout=TIMEOUT_S)
        assert job.returncode == 0, errors
        assert "sum 3.0" in (work_dir / f"node{node}" / f"worker_{node}.log").read_text()


@pytest.mark.slow
def test_a_rank_lost_on_another_node_ends_this_one_within_seconds_and_is_named(work_dir: Path) -> None:
    port = str(free_port())
    jobs = [
        start(work_dir, "sum.py forever", "2", "1", "127.0.0.1", port, str(node), f"node{node}", "True", "60")
        for node in range(2)
    ]
    logs = [work_dir / f"node{node}" / f"worker_{node}.log" for node in range(2)]
    deadline = time.monotonic() + TIMEOUT_S
    while not all(log.is_file() and "sum 3.0" in log.read_text() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    watcher = int((work_dir / "node1" / ".running_on_node_1_rank_1").read_text().splitlines()[1])
    os.kill(watcher, signal.SIGKILL)
    started = time.monotonic()
    _, errors = jobs[0].communicate(timeout=TIMEOUT_S)
    elapsed_s = time.monotonic() - started
    jobs[1].communicate(timeout=TIMEOUT_S)
    assert [job.returncode for job in jobs] == [1, 1]
    assert "ranks of other nodes that fell silent first: 1" in errors
    assert elapsed_s < 25, f"{elapsed_s} s; MindSpore alone notices after 30"
    assert processes_in(work_dir) == []
