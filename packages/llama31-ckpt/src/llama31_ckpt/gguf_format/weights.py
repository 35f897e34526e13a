"""The weights of a GGUF file under canonical names: dequantised and with rotary rows in HF's order, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from llama31_ckpt.gguf_format.header import GgufHeader
from llama31_ckpt.rotary import read_half_split
from llama31_core.checkpoint.dtypes import Array, dtype_of
from llama31_core.checkpoint.names import canonical_name, is_ignorable, rotary_heads
from llama31_core.checkpoint.stored import OpenFile, resolve_index
from llama31_core.errors import CheckpointError

# Types that are plain arrays; every other is dequantised to float32.
_PLAIN = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}


class GgufWeights:
    """A GGUF file as `llama31_core.checkpoint.Weights`.

    Attributes:
        source: the file.
        ignored: entries that are no weights.
    """

    def __init__(self, file: OpenFile, header: GgufHeader, head_dim: int) -> None:
        self.source: Path = file.path
        self._file = file
        self._header = header
        self._head_dim = head_dim
        self._stored: dict[str, str] = {}
        for stored in header.tensors:
            if not is_ignorable(stored):
                self._stored[canonical_name(stored, "gguf") or stored] = stored
        self.ignored = tuple(name for name in header.tensors if is_ignorable(name))

    def names(self) -> tuple[str, ...]:
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header.tensors[self._stored[name]].shape

    def dtype(self, name: str) -> str:
        return _PLAIN.get(self._header.tensors[self._stored[name]].kind, "float32")

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        """The selected part of a tensor; whole rows are read, and whole heads where rows are rotary pairs."""
        shape = self.shape(name)
        (start, stop), *columns = resolve_index(shape, index)
        read, head_dim = partial(self._read_rows, name), self._head_dim
        if rotary_heads(name) is None:
            rows = read(start, stop)
        elif shape[0] % head_dim:
            raise CheckpointError(f"{self.source}: {name} has {shape[0]} rows, expected whole heads of {head_dim}")
        else:
            rows = read_half_split(read, start, stop, head_dim)
        return rows[(slice(None), *(slice(*bounds) for bounds in columns))]

    def _read_rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self._header.tensors[self._stored[name]]
        if len(tensor.shape) == 1:
            return self._decode(name, tensor.kind, self._file.read(tensor.offset, tensor.size_bytes))[start:stop]
        row_bytes = tensor.row_bytes
        data = self._file.read(tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        return self._decode(name, tensor.kind, data).reshape(stop - start, *tensor.shape[1:])

    def _decode(self, name: str, kind: GGMLQuantizationType, data: bytes) -> Array:
        """The values of whole blocks as a flat array."""
        if kind in _PLAIN:
            return np.frombuffer(data, dtype_of(_PLAIN[kind]).numpy)
        try:
            values: Array = dequantize(np.frombuffer(data, np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} is quantised as {kind.name}, which the gguf library cannot dequantise"
            ) from error
        return values.reshape(-1)

    def close(self) -> None:
        self._file.close()
