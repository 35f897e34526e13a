"""Which device MindSpore computes on, as far as that can be known without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

ASCEND = Path("/dev/davinci_manager")  # the NPU driver's


def device_target() -> str:
    """What MindSpore is set to once it is imported; before, `Ascend` on a machine with NPUs and `CPU` on others."""
    mindspore = sys.modules.get("mindspore")
    if mindspore is not None and hasattr(mindspore, "get_context"):
        return str(mindspore.get_context("device_target"))
    return "Ascend" if ASCEND.exists() else "CPU"
