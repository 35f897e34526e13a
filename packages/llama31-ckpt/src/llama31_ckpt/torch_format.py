"""PyTorch checkpoints: HF's `pytorch_model.bin` and Meta's `consolidated.NN.pth` in, canonical weights out.

Files are loaded with `weights_only=True`, so a pickle that would execute code is an error, and memory-mapped, so that a
tensor is read when it is asked for. torch is an optional dependency (`pip install llama31-ckpt[torch]`).
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama31_ckpt.rotary import read_half_split
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.stored import resolve_index
from llama31_core.errors import CheckpointError


@dataclass(frozen=True)
class Joined:
    """A tensor as tensor-parallel parts of it.

    Attributes:
        parts: torch tensors; one if it is not split.
        axis: the axis along which they are joined.
        head_dim: set if the rows are rotary pairs in Meta's order.
    """

    parts: tuple[Any, ...]
    axis: int = 0
    head_dim: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)


class TorchWeights:
    """Joined torch tensors as `llama31_core.checkpoint.Weights`."""

    def __init__(self, source: Path, tensors: Mapping[str, Joined]) -> None:
        self.source = source
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].parts[0].dtype).removeprefix("torch.")

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        """The selected part; whole heads are read where rows are rotary pairs."""
        tensor = self._tensors[name]
        bounds = resolve_index(tensor.shape, index)
        if not bounds:
            return _as_numpy(tensor.parts[0])
        (start, stop), *columns = bounds
        head_dim = tensor.head_dim
        read = partial(_read_rows, tensor)
        rows = read(start, stop) if head_dim is None else read_half_split(read, start, stop, head_dim)
        return rows[(slice(None), *(slice(*bound) for bound in columns))]


def _read_rows(tensor: Joined, start: int, stop: int) -> Array:
    if tensor.axis == 1:
        return np.concatenate([_as_numpy(part[start:stop]) for part in tensor.parts], axis=1)
    rows, offset = [], 0
    for part in tensor.parts:
        size = part.shape[0]
        first, last = max(start - offset, 0), min(stop - offset, size)
        if first < last:
            rows.append(_as_numpy(part[first:last]))
        offset += size
    if not rows:
        return _as_numpy(tensor.parts[0][:0])
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _as_numpy(tensor: Any) -> Array:
    torch = _import_torch()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = tensor.contiguous().numpy()
    return array


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise CheckpointError(
            "PyTorch checkpoints need torch, which is not installed; pip install 'llama31-ckpt[torch]'"
        ) from error


def load_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a PyTorch file by name, memory-mapped where the file allows it.

    Raises:
        CheckpointError: torch is missing, or the file is damaged, holds objects other than tensors, or would run code.
    """
    torch = _import_torch()
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler interprets foreign bytes, and raises whatever they lead it to
        raise CheckpointError(f"{path} cannot be loaded as tensors alone: {_reason(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}, expected a tensor")
    return content


def _reason(error: Exception) -> str:
    """Why torch did not load a file, without its advice to load it all the same."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):
        blocked = re.search(r"GLOBAL (\S+)", text)
        what = f"to load {blocked[1]}" if blocked else "what is no tensor"
        return f"it asks {what}, which may run code; get the weights as safetensors"
    first = text.splitlines()[0][:200] if text else type(error).__name__
    return f"{first.split('  (')[0]}; it is damaged or no PyTorch file"
