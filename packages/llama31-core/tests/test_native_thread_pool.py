"""The native kernels' pool of threads: every item once, and no waiting for threads that the system does not run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llama31_core.kernels import native
from llama31_core.native_support import find_compiler

_LOOPS = """
#include <cstdio>
#include "thread_pool.h"
using llama31::ThreadPool;

int main() {
  ThreadPool::num_threads = 8;  // more than there are cores: some are always kept from running
  int64_t wrong = 0;
  for (int64_t i = 0; i < 20000; ++i) {
    std::vector<int> visits(1 + i % 97);
    ThreadPool::Get().For(visits.size(), 1 + i % 3, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) visits[begin]++;
    });
    for (int count : visits) wrong += count != 1;
  }
  std::printf("%ld", static_cast<long>(wrong));
}
"""


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the pool pauses with an instruction of x86-64")
def test_every_item_is_visited_once_by_more_threads_than_cores(tmp_path: Path) -> None:
    source, program = tmp_path / "loops.cc", tmp_path / "loops"
    source.write_text(_LOOPS)
    headers = Path(native.__file__).parent
    command = [
        find_compiler() or "",
        "-std=c++17",
        "-O2",
        "-pthread",
        "-I",
        str(headers),
        "-o",
        str(program),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=60)
    # With waiting for every thread in each loop this takes minutes: a loop would wait for the scheduler eight times.
    finished = subprocess.run([str(program)], check=True, timeout=30, capture_output=True, text=True)
    assert finished.stdout == "0"
