"""What a run begins with: weights that training can start from, and room for what it writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama31_core.checkpoint import WeightsReader
from llama31_core.checkpoint.dtypes import Array
from llama31_core.errors import CheckpointError, ConfigError


def finite(weights: WeightsReader) -> Callable[[str], Array]:
    """Reads weights, and refuses values that no training could start from."""

    def read(name: str) -> Array:
        value: Array = weights.read(name)
        if not np.isfinite(value.astype(np.float32)).all():
            raise CheckpointError(f"{weights.source}: {name} holds values that are no numbers; use another checkpoint")
        return value

    return read


def check_room(destination: Path, needed_bytes: int) -> None:
    """See that a result of this size can be written, before the work for it is done."""
    place = next(parent for parent in destination.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".llama31-"):
            free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        raise ConfigError(f"output_dir: {destination} cannot be written: {error.strerror}; set another") from error
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"output_dir: {destination} needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free there"
        )
