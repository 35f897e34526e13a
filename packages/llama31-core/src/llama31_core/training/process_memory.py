"""The memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """The most that was resident. getrusage would begin at what the process that started this one had."""
    return _status_bytes("VmHWM")


def file_bytes() -> int:
    """Resident pages of files, libraries most of all, which the kernel can take back."""
    return _status_bytes("RssFile")


def _status_bytes(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[name].split()[0]) * 1024
