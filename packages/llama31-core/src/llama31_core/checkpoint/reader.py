"""Reading a checkpoint under canonical names: a file or model directory in, named arrays (or parts of them) out.

`open_weights` takes safetensors (one file, or shards with an index) and MindSpore `.ckpt`, with HF's or MindFormers'
names, told apart by content and never by file name. MindFormers' fused `w_qkv` and `w_gate_hidden` read as the
tensors they are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.files import open_tensor_files
from llama31_core.checkpoint.names import (
    canonical_name,
    fused_members,
    is_ignorable,
    is_training_state,
    split_layer,
    split_moment,
)
from llama31_core.checkpoint.stored import TensorFiles
from llama31_core.errors import CheckpointError

logger = logging.getLogger(__name__)
Shape = tuple[int, ...]


class Weights(Protocol):
    """Named weights that can be read in part. Names that the name table does not know are kept as they are."""

    @property
    def source(self) -> Path: ...

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> str: ...

    def read_slice(self, name: str, index: Sequence[slice]) -> Array: ...


@dataclass(frozen=True)
class _Piece:
    """A canonical tensor as rows of a stored one; `rows` is None where it is the whole."""

    stored: str
    rows: tuple[int, int] | None = None


class WeightsReader:
    """The weights of a checkpoint on disk under canonical names.

    Attributes:
        source: the file or directory that was opened.
        ignored: entries that are no weights (rotary caches, training state), by their name in the file.
        states: optimiser and loop state, readable like weights; moments under the canonical name of their parameter.
    """

    def __init__(self, files: TensorFiles) -> None:
        self.source = files.source
        self._files = files
        self._pieces: dict[str, _Piece] = {}
        self._states: dict[str, _Piece] = {}
        ignored = []
        for name in files.tensors:
            if is_ignorable(name):
                ignored.append(name)
                if is_training_state(name):
                    self._states |= self._state_pieces(name)
            else:
                for canonical, piece in self._pieces_of(name):
                    if canonical in self._pieces:
                        other = self._pieces[canonical].stored
                        raise CheckpointError(f"{self.source}: {name!r} and {other!r} are both {canonical!r}")
                    self._pieces[canonical] = piece
        self.ignored = tuple(ignored)
        self.states = tuple(self._states)
        if not self._pieces:
            raise CheckpointError(f"{self.source} holds no weights")
        if ignored:
            logger.info("%s: %d entries are no weights and are not read", self.source, len(ignored))

    def _pieces_of(self, stored: str) -> list[tuple[str, _Piece]]:
        names = fused_members(stored)
        if names == (stored,):
            return [(_canonical(stored), _Piece(stored))]
        pieces, start = [], 0
        for name, count in zip(names, self._fused_rows(stored, len(names)), strict=True):
            pieces.append((name, _Piece(stored, (start, start + count))))
            start += count
        return pieces

    def _state_pieces(self, stored: str) -> dict[str, _Piece]:
        prefix, parameter = split_moment(stored)
        whole = self._files.tensors.get(parameter)
        # A fused moment split over dp holds other rows than its parameter: it keeps its name, which no layout has.
        if not prefix or whole is None or whole.shape != self._files.tensors[stored].shape:
            return {prefix + _canonical(parameter): _Piece(stored)}
        return {prefix + name: _Piece(stored, piece.rows) for name, piece in self._pieces_of(parameter)}

    def _fused_rows(self, stored: str, parts: int) -> list[int]:
        """How many rows of a fused tensor each of its parts has; on a rank, of the part of it that the rank has."""
        shape = self._files.tensors[stored].shape
        rows = shape[0] if len(shape) == 2 else 0
        if parts == 2:
            counts = [rows // 2, rows // 2]
        else:
            # wo maps the heads back to the residual stream: its columns are wq's rows; wk and wv share the rest.
            layer = split_layer(stored)[1]
            candidates = [f"model.layers.{layer}.attention.wo.weight", f"model.layers.{layer}.self_attn.o_proj.weight"]
            wo = next((self._files.tensors[name] for name in candidates if name in self._files.tensors), None)
            q_rows = wo.shape[1] if wo is not None and len(wo.shape) == 2 else rows + 1
            counts = [q_rows, (rows - q_rows) // 2, (rows - q_rows) // 2]
        if sum(counts) != rows or min(counts) <= 0:
            raise CheckpointError(f"{self.source}: fused tensor {stored!r} of shape {shape} cannot be split in {parts}")
        return counts

    def names(self) -> tuple[str, ...]:
        return tuple(self._pieces)

    def stored_name(self, name: str) -> str:
        """The name under which the file holds this tensor (or the fused tensor it is part of)."""
        return self._piece(name).stored

    def shape(self, name: str) -> Shape:
        piece = self._piece(name)
        shape = self._files.tensors[piece.stored].shape
        return shape if piece.rows is None else (piece.rows[1] - piece.rows[0], *shape[1:])

    def dtype(self, name: str) -> str:
        """`float32`, `bfloat16`, `float16`, or the numpy name of a type that no weight has."""
        return self._files.tensors[self._piece(name).stored].dtype.name

    def read(self, name: str) -> Array:
        """The whole tensor in its stored dtype (`ml_dtypes.bfloat16` for bfloat16)."""
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        """The part of a tensor that `index` selects, reading no other bytes; missing axes are taken whole."""
        piece = self._piece(name)
        if piece.rows is not None:
            first, last = piece.rows
            start, stop, step = (index[0] if index else slice(None)).indices(last - first)
            index = (slice(first + start, first + max(start, stop), step), *index[1:])
        return self._files.read_slice(piece.stored, index)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._files.bytes_read

    def _piece(self, name: str) -> _Piece:
        piece = self._pieces.get(name) or self._states.get(name)
        if piece is None:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        return piece

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _canonical(stored: str) -> str:
    return canonical_name(stored, "mindformers") or canonical_name(stored, "hf") or stored


def open_weights(path: str | Path) -> WeightsReader:
    """Open a checkpoint: a model directory, a safetensors file or index, or a MindSpore `.ckpt`.

    Raises:
        CheckpointError: missing, damaged, ambiguous or of another format; duplicate tensors.
    """
    return WeightsReader(open_tensor_files(Path(path)))
