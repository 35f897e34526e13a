"""How fast this machine's memory is read by so many threads: a C++ loop over half a gibibyte."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from llama31_core.native_support import find_compiler

_SOURCE = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <thread>
#include <vector>

int main(int, char **argv) {
  const int threads = std::atoi(argv[1]);
  std::vector<uint64_t> data(1 << 26, 1);  // half a gibibyte, far more than any cache
  double best = 0;
  for (int round = 0; round < 8; ++round) {
    std::vector<uint64_t> sums(threads * 8);
    std::vector<std::thread> pool;
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        uint64_t sum = 0;
        for (size_t i = data.size() * t / threads; i < data.size() * (t + 1) / threads; ++i) sum += data[i];
        sums[t * 8] = sum;
      });
    }
    for (auto &thread : pool) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (data.size() * 8 / seconds > best && sums[0]) best = data.size() * 8 / seconds;
  }
  std::printf("%.0f", best);
}
"""


def read_bandwidth(threads: int) -> float:
    """Bytes/s of sequential reading, the best of eight rounds."""
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("measuring the memory's bandwidth needs g++ or clang++")
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory) / "read.cc", Path(directory) / "read"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-O3", "-march=native", "-pthread", "-o", str(program), str(source)], check=True)
        return float(subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout)
