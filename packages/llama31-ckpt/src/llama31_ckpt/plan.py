"""What a conversion will write: a source and wishes in; tensors with their names, types and parts out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llama31_ckpt.reading import read_rows
from llama31_ckpt.sources import Source
from llama31_core.checkpoint.dtypes import BY_NAME, Array, dtype_of
from llama31_core.checkpoint.names import (
    EMBEDDING,
    LM_HEAD,
    Scheme,
    fused_members,
    fused_name,
    is_training_state,
    order_key,
    spell,
)
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.shapes import parameter_shapes, report_differences
from llama31_core.checkpoint.writer import TensorSpec
from llama31_core.errors import CheckpointError


@dataclass(frozen=True)
class Plan:
    """The tensors to write, in order.

    Attributes:
        specs: name in the output, shape and dtype.
        parts: for each output name the canonical tensors whose rows it stacks.
        notes: what is left out of the output.
    """

    specs: tuple[TensorSpec, ...]
    parts: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.specs)

    @property
    def main_dtype(self) -> str:
        """The dtype that most bytes have."""
        sizes: dict[str, int] = {}
        for spec in self.specs:
            sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.size_bytes
        return max(sizes, key=lambda name: sizes[name])


def plan_tensors(
    source: Source,
    *,
    dtype: str | None = None,
    naming: Scheme = "mindformers",
    qkv_concat: bool = False,
    states: bool = False,
) -> Plan:
    """Plan the output.

    Args:
        source: from `open_source`.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the dtype of each tensor.
        naming: whose names to write.
        qkv_concat: stack wq, wk, wv and w1, w3 as MindFormers' `qkv_concat` does.
        states: take optimiser and loop state along, each in its own dtype.

    Raises:
        CheckpointError: the source has not just the tensors of its config, or they cannot be stacked.
    """
    weights, expected = source.weights, parameter_shapes(source.config)
    notes = _check_tensors(source, states)
    dtypes = {name: dtype_of(dtype if dtype is not None else weights.dtype(name)) for name in expected}
    specs: list[TensorSpec] = []
    parts: dict[str, tuple[str, ...]] = {}
    for name, shape in expected.items():
        output = fused_name(name) if qkv_concat else spell(name, naming)
        if output in parts:
            continue
        members = fused_members(output) if qkv_concat else (name,)
        kinds = {dtypes[member].name for member in members}
        if len(kinds) > 1:
            raise CheckpointError(f"{source.path}: {output} would stack {' and '.join(sorted(kinds))}; give --dtype")
        rows = sum(expected[member][0] for member in members)
        specs.append(TensorSpec(output, (rows, *shape[1:]), dtypes[name]))
        parts[output] = members
    for name in sorted(source.states, key=order_key) if states else ():
        specs.append(TensorSpec(name, weights.shape(name), BY_NAME[weights.dtype(name)]))
        parts[name] = (name,)
    return Plan(tuple(specs), parts, notes)


def _check_tensors(source: Source, states: bool) -> tuple[str, ...]:
    weights, expected = source.weights, parameter_shapes(source.config)
    found = {name: weights.shape(name) for name in weights.names()}
    notes = []
    ignored = [name for name in source.ignored if not (states and is_training_state(name))]
    if ignored:
        more = "" if len(ignored) == 1 else ", …"
        notes.append(f"{len(ignored)} entries that are no weights were left out ({ignored[0]}{more})")
    if LM_HEAD in found and LM_HEAD not in expected and found[LM_HEAD] == found.get(EMBEDDING):
        _check_tied_head(weights)
        del found[LM_HEAD]
        notes.append(f"{LM_HEAD} equals the tied embedding and was left out")
    report_differences(str(source.path), found, expected)
    return tuple(notes)


def _check_tied_head(weights: Weights) -> None:
    for embedding, head in zip(read_rows(weights, EMBEDDING), read_rows(weights, LM_HEAD), strict=True):
        if embedding.dtype != head.dtype or not np.array_equal(_bits(embedding), _bits(head)):
            raise CheckpointError(
                f"{weights.source}: the config ties the head to the embedding, but {LM_HEAD} differs from it; "
                "set tie_word_embeddings to false"
            )


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
