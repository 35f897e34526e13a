"""Training on CPU ranks equals training on one process; the whole grid is slow, some of it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GRID = Path(__file__).resolve().parents[1] / "tools" / "run_parallel_grid.py"


def run_grid(log_dir: Path, *arguments: str) -> str:
    """The table; differences above the tolerance and failed ranks fail the command."""
    command = [sys.executable, str(GRID), "--log-dir", str(log_dir), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_mesh_of_each_kind_equals_one_process(tmp_path: Path) -> None:
    cases = ["tp4-kv-copies-sp", "pp2-dp2-zero2-tied", "cp2-tp2"]
    table = run_grid(tmp_path, "--ranks", "4", *cases)
    assert all(f"| {case} | 4 |" in table for case in cases)


@pytest.mark.slow
def test_the_whole_grid_equals_one_process(tmp_path: Path) -> None:
    assert run_grid(tmp_path).count("\n| ") > 25


def test_an_unknown_case_is_named() -> None:
    done = subprocess.run([sys.executable, str(GRID), "tp3"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no case is called tp3; --list names them" in done.stderr
