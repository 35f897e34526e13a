"""Progress bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def byte_bar(total_bytes: int, label: str) -> tqdm[Any]:
    """A progress bar in GB and GB/s on stderr; silent when that is no terminal."""
    bar: tqdm[Any] = tqdm(
        total=total_bytes,
        desc=label,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )
    return bar


def item_bar(total: int, label: str) -> tqdm[Any]:
    """A progress bar of tensors, likewise."""
    bar: tqdm[Any] = tqdm(total=total, desc=label, unit="tensor", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    return bar
