"""A progress bar on stderr, silent where nobody watches."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm import tqdm


def progress_bar(unit: str) -> tqdm[NoReturn]:
    """A bar that counts `unit`s; use it as a context manager."""
    tqdm.monitor_interval = 0  # no thread of tqdm's: workers are forked
    return tqdm(unit=f" {unit}", unit_scale=True, disable=not sys.stderr.isatty(), dynamic_ncols=True)
