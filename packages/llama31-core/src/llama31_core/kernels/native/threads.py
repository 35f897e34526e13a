"""How many threads the native kernels take: one for each core that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from llama31_core.errors import ConfigError

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def num_threads() -> int:
    """LLAMA31_NUM_THREADS, else OMP_NUM_THREADS, else the cores of the process's affinity, within its group's quota.

    Threads of one core share its vector units, so they count once. MindSpore sets OMP_NUM_THREADS for C programs when
    it is imported; what the user set is in `os.environ`.

    Raises:
        ConfigError: a variable is not a positive number.
    """
    for name in ("LLAMA31_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text:
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(f"{name} is {text!r}, expected a number of threads of at least 1")
            return int(text)
    return max(1, min(_cores(os.sched_getaffinity(0)), _quota()))


def _cores(cpus: set[int]) -> int:
    siblings = (_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in cpus)
    try:
        return len({path.read_text(encoding="ascii") for path in siblings})
    except OSError:
        return len(cpus)


def _quota() -> int:
    """Whole processors of the control group's time; a large number if it is not limited."""
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return 1 << 16
