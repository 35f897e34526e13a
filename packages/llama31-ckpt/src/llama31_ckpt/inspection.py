"""What a checkpoint holds: a source in, a report of its tensors, types, sizes and likely model out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llama31_ckpt.sources import Source
from llama31_core.checkpoint.dtypes import BY_NAME
from llama31_core.checkpoint.manifest import MANIFEST_NAME, read_manifest
from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD, split_layer
from llama31_core.checkpoint.reader import Weights, WeightsReader
from llama31_core.errors import CheckpointError
from llama31_core.presets import PRESETS


@dataclass(frozen=True)
class TensorReport:
    """One tensor, as `inspect` lists it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    stored_name: str


@dataclass(frozen=True)
class Inspection:
    """The report of `inspect`."""

    path: str
    format: str
    model: str
    num_parameters: int
    size_bytes: int
    dtypes: dict[str, int]
    ignored: tuple[str, ...]
    config: dict[str, Any] | None
    layout: dict[str, Any] | None
    tensors: tuple[TensorReport, ...]


def inspect_source(source: Source) -> Inspection:
    """Describe a checkpoint from its headers alone; no tensor data is read."""
    weights = source.weights
    tensors = tuple(_describe(weights, name) for name in weights.names())
    manifest = source.path / MANIFEST_NAME
    layout = read_manifest(manifest).get("layout") if source.format == "ranks" and manifest.is_file() else None
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return Inspection(
        path=str(source.path),
        format=source.format,
        model=guess_model(weights),
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        dtypes=dtypes,
        ignored=source.ignored,
        config=None if source.found_config is None else source.found_config.to_hf(),
        layout=layout,
        tensors=tensors,
    )


def _describe(weights: Weights, name: str) -> TensorReport:
    shape, dtype = weights.shape(name), weights.dtype(name)
    stored = weights.stored_name(name) if isinstance(weights, WeightsReader) else name
    return TensorReport(name, shape, dtype, tensor_bytes(weights, name), stored)


def tensor_bytes(weights: Weights, name: str) -> int:
    """Size of a tensor in the dtype it is read in."""
    dtype = weights.dtype(name)
    if dtype not in BY_NAME:
        raise CheckpointError(f"{weights.source}: tensor {name!r} has dtype {dtype}, allowed are {', '.join(BY_NAME)}")
    return math.prod(weights.shape(name)) * BY_NAME[dtype].size_bytes


def guess_model(weights: Weights) -> str:
    """The published model whose sizes the shapes have, or the sizes themselves."""
    shapes = {name: weights.shape(name) for name in weights.names()}
    layers = {layer for _, layer in map(split_layer, shapes) if layer is not None}
    embedding = shapes.get(EMBEDDING, ())
    wk = shapes.get("model.layers.0.attention.wk.weight", ())
    w1 = shapes.get("model.layers.0.feed_forward.w1.weight", ())
    if not (len(embedding) == len(wk) == len(w1) == 2):
        return "not a whole Llama model"
    tied = LM_HEAD not in shapes
    for name, preset in PRESETS.items():
        sizes = ((preset.vocab_size, preset.dim), preset.n_kv_heads * preset.head_dim, preset.ffn_dim, preset.n_layers)
        if sizes == (embedding, wk[0], w1[0], len(layers)):
            return f"{name} or a model of its shape"
    head = "tied" if tied else "untied"
    return f"Llama of {len(layers)} layers, width {embedding[1]}, vocabulary {embedding[0]}, {head}"
