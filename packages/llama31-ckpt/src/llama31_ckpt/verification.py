"""Whether a checkpoint is sound: a source in, a list of problems out (none: it is)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama31_ckpt.reading import read_rows
from llama31_ckpt.sources import Source
from llama31_core.checkpoint.ckpt_format import check_crc
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.files import find_weights
from llama31_core.checkpoint.manifest import MANIFEST_NAME, manifest_beside, manifest_problems
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.shapes import check_weights
from llama31_core.checkpoint.sharded import rank_directories
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.errors import CheckpointError

_MAX_LISTED = 10


def verify_source(source: Source, on_bytes: Callable[[int], object]) -> tuple[list[str], list[str]]:
    """Check a checkpoint against its manifest, its config and for values that are no numbers.

    Args:
        source: from `open_source`.
        on_bytes: told the size of each chunk that has been scanned.

    Returns:
        The problems, and what could not be checked.
    """
    problems, unchecked = [], []
    manifest = manifest_beside(source.path)
    if manifest.is_file():
        problems += manifest_problems(manifest)
    else:
        unchecked.append("no manifest: the sha256 of the files was not checked")
    for rank, directory in rank_directories(source.path).items():
        if (directory / MANIFEST_NAME).is_file():
            problems += [f"rank_{rank}: {line}" for line in manifest_problems(directory / MANIFEST_NAME)]
    if source.format == "ckpt":
        problems += _crc_problems(find_weights(source.path))
    if source.found_config is None:
        unchecked.append("no config: the set of tensors and their shapes were not checked")
    else:
        try:
            check_weights(source.weights, source.found_config)
        except CheckpointError as error:
            problems.append(str(error))
    broken = [line for name in source.weights.names() for line in _scan(source.weights, name, on_bytes)]
    problems += broken[:_MAX_LISTED]
    if len(broken) > _MAX_LISTED:
        problems.append(f"{len(broken) - _MAX_LISTED} more tensors have values that are no numbers")
    return problems, unchecked


def _crc_problems(path: Path) -> list[str]:
    return [f"{path.name}: its CRC-32 does not fit its content"] if check_crc(OpenFile(path)) is False else []


def _scan(weights: Weights, name: str, on_bytes: Callable[[int], object]) -> list[str]:
    nans = infinities = 0
    for chunk in read_rows(weights, name):
        finite, nan = _count(chunk)
        nans += nan
        infinities += chunk.size - finite - nan
        on_bytes(chunk.nbytes)
    return [f"{name} has {nans} NaN and {infinities} Inf"] if nans or infinities else []


def _count(chunk: Array) -> tuple[int, int]:
    """How many values are finite, and how many NaN."""
    values = chunk.astype(np.float32, copy=False)
    finite = int(np.count_nonzero(np.isfinite(values)))
    return finite, 0 if finite == chunk.size else int(np.count_nonzero(np.isnan(values)))
