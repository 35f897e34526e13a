"""The peak of a process is its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from llama31_core.training.process_memory import file_bytes, peak_bytes


def test_the_peak_of_a_small_process_is_small_whoever_starts_it() -> None:
    held = np.ones(40_000_000)  # 320 MB
    program = "from llama31_core.training import process_memory; print(process_memory.peak_bytes())"
    command = [sys.executable, "-c", program]
    child = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert child < held.nbytes < peak_bytes()
    assert 0 < file_bytes() < peak_bytes()


def test_the_peak_stays_when_memory_is_given_back() -> None:
    before = peak_bytes()
    held = np.ones(before // 8 + 10_000_000)
    held_bytes = held.nbytes
    del held
    assert peak_bytes() >= held_bytes > before
