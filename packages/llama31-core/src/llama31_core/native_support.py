"""What the native CPU kernels (`kernels/native`) need of a machine. It is asked before MindSpore is imported, too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# The sets of instructions that the kernels are written in, the best first; /proc/cpuinfo's names and the compiler's.
INSTRUCTION_SETS: tuple[dict[str, str], ...] = (
    {
        "avx512f": "-mavx512f",
        "avx512bw": "-mavx512bw",
        "avx512dq": "-mavx512dq",
        "avx512vl": "-mavx512vl",
        "avx512vbmi": "-mavx512vbmi",
        "avx512_bf16": "-mavx512bf16",
        "fma": "-mfma",
    },
    {"avx2": "-mavx2", "fma": "-mfma"},
)


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or g++, or clang++."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def instruction_options() -> tuple[str, ...] | None:
    """The compiler's options for the best set of instructions that this CPU has; None if it has none of them."""
    features = _cpu_features()
    return next((tuple(names.values()) for names in INSTRUCTION_SETS if features.issuperset(names)), None)


def what_is_missing() -> str | None:
    """Why the kernels cannot run here, in one sentence; None if they can."""
    if os.environ.get("LLAMA31_NATIVE_KERNELS") == "0":
        return "LLAMA31_NATIVE_KERNELS=0 switches the native kernels off"
    if instruction_options() is None:
        return f"the native kernels need a CPU with {' and '.join(INSTRUCTION_SETS[-1])}"
    if find_compiler() is None:
        return "the native kernels need g++ or clang++ once, to be compiled; install one"
    return None


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
