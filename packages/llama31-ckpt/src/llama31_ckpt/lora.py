"""Base weights with a LoRA adapter merged in: W + scale * B A for every weight that the adapter changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.stored import resolve_index
from llama31_core.errors import CheckpointError
from llama31_core.lora.adapter import LowRank


class MergedWeights:
    """Base weights with an adapter merged in, as `llama31_core.checkpoint.Weights`.

    A changed tensor reads as float32, so that writing it rounds once; `dtype` is the base's, which is what is written.
    """

    def __init__(self, base: Weights, adapter: Mapping[str, LowRank], source: Path) -> None:
        self.source = base.source
        self._base = base
        self._adapter = adapter
        names = set(base.names())
        for name, change in adapter.items():
            if name not in names:
                raise CheckpointError(f"{source} changes {name}, which {base.source} does not have")
            if base.shape(name) != change.shape:
                raise CheckpointError(
                    f"{source} changes {name} as {change.shape}, in {base.source} it is {base.shape(name)}"
                )

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> str:
        return self._base.dtype(name)

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        base = self._base.read_slice(name, index)
        change = self._adapter.get(name)
        if change is None:
            return base
        rows, columns = (slice(*bounds) for bounds in resolve_index(self.shape(name), index))
        delta: Array = (change.b[rows] @ change.a[:, columns]) * np.float32(change.scale)
        return base.astype(np.float32) + delta
