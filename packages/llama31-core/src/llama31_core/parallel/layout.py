"""The layout table: which axis of the mesh splits which axis of a parameter; the one source of who holds what.

From it follow the slices that a rank loads, how checkpoints are sharded and merged, and MindSpore's strategy files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from llama31_core.checkpoint.names import is_training_state, split_layer, split_moment
from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import AXES, Coordinates, ParallelConfig

# What splits each axis of a parameter:
#   "tp"     every tp rank has an equal part, in order
#   "kv"     like "tp", in whole key-value heads; with more ranks than heads, neighbours hold copies of one head
#   "vocab"  "tp" if the mesh is vocab_parallel, else not split
#   None     not split
LAYOUT: dict[str, tuple[str | None, ...]] = {
    "model.tok_embeddings.embedding_weight": ("vocab", None),
    "model.layers.{}.attention_norm.weight": (None,),
    "model.layers.{}.attention.wq.weight": ("tp", None),
    "model.layers.{}.attention.wk.weight": ("kv", None),
    "model.layers.{}.attention.wv.weight": ("kv", None),
    "model.layers.{}.attention.wo.weight": (None, "tp"),
    "model.layers.{}.ffn_norm.weight": (None,),
    "model.layers.{}.feed_forward.w1.weight": ("tp", None),
    "model.layers.{}.feed_forward.w3.weight": ("tp", None),
    "model.layers.{}.feed_forward.w2.weight": (None, "tp"),
    "model.norm_out.weight": (None,),
    "lm_head.weight": ("tp", None),
}

# What splits each axis of an activation, beside the above:
#   "dp"      every replica has its own sequences
#   "cp"      every cp rank has its own tokens of them
#   "tokens"  "cp", and with sequence_parallel each of these parts over tp again
ACTIVATIONS: dict[str, tuple[str | None, ...]] = {
    "hidden": ("dp", "tokens", None),  # (B, T, dim), between layers and stages
    "normed": ("dp", "cp", None),  # (B, T, dim), into split layers
    "query": ("dp", "cp", "tp", None),  # (B, T, H, head_dim)
    "key_value": ("dp", "cp", "kv", None),  # (B, T, K, head_dim)
    "attention_out": ("dp", "cp", "tp"),  # (B, T, H * head_dim)
    "ffn_inner": ("dp", "cp", "tp"),  # (B, T, ffn_dim)
    "logits": ("dp", "cp", "tp"),  # (B, T, vocab_size), of some tokens at a time
}

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class ParameterShard:
    """What one rank holds of one parameter.

    Attributes:
        name: canonical.
        full_shape: of the whole parameter.
        parts: into how many parts each axis is split.
        slices: the rank's part, with plain start and stop.
        copies: ranks of a tp group that hold this same part.
        optimizer_slices: the part whose optimiser state the rank keeps, in the same coordinates.
    """

    name: str
    full_shape: tuple[int, ...]
    parts: tuple[int, ...]
    slices: Slices
    copies: int
    optimizer_slices: Slices

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rank's part."""
        return tuple(part.stop - part.start for part in self.slices)


def plan_shards(config: ModelConfig, parallel: ParallelConfig, rank: int) -> dict[str, ParameterShard]:
    """The parameters that a rank holds, in checkpoint order.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    parallel.check(config)
    at = parallel.coordinates(rank)
    shapes = parameter_shapes(config)
    return {
        name: _shard(name, shape, config, parallel, at)
        for name, shape in shapes.items()
        if at.pp in stages_of(name, config, parallel)
    }


class Layout(Protocol):
    """Who holds what of a checkpoint's tensors, optimiser and loop state included."""

    @property
    def world_size(self) -> int: ...

    def place(self, name: str, full_shape: tuple[int, ...], rank: int) -> Slices | None:
        """The rank's part of a tensor; None if it has none of it."""

    def full_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor of which a rank's part has `shape`."""

    def mesh(self) -> dict[str, Any] | None:
        """The mesh for the manifest, where it is known by its axes."""


@dataclass(frozen=True)
class TableLayout:
    """The layout that the table gives a model on a mesh."""

    config: ModelConfig
    parallel: ParallelConfig

    @property
    def world_size(self) -> int:
        return self.parallel.world_size

    def place(self, name: str, full_shape: tuple[int, ...], rank: int) -> Slices | None:
        """As `plan_shards` says for parameters and their moments; loop state (`global_step`) is whole on every rank.

        Raises:
            ConfigError: the model does not divide over the mesh, or has no such parameter.
        """
        prefix, parameter = split_moment(name)
        if not prefix and is_training_state(name):
            return whole(full_shape)
        self._parameter_shape(name, parameter)
        shard = _cached_shards(self.config, self.parallel, rank).get(parameter)
        if shard is None:
            return None
        if shard.full_shape != full_shape:
            raise ConfigError(f"{name} has shape {full_shape}, its config says {shard.full_shape}")
        return shard.optimizer_slices if prefix else shard.slices

    def full_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        prefix, parameter = split_moment(name)
        return shape if not prefix and is_training_state(name) else self._parameter_shape(name, parameter)

    def _parameter_shape(self, name: str, parameter: str) -> tuple[int, ...]:
        shapes = parameter_shapes(self.config)
        if parameter not in shapes:
            raise ConfigError(f"the layout table has no row for {name}; a model of this config has no such tensor")
        return shapes[parameter]

    def mesh(self) -> dict[str, Any]:
        return self.parallel.model_dump(mode="json")


@dataclass(frozen=True)
class WholeLayout:
    """One rank that holds everything (a `Layout`)."""

    @property
    def world_size(self) -> int:
        return 1

    def place(self, name: str, full_shape: tuple[int, ...], rank: int) -> Slices:
        return whole(full_shape)

    def full_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def mesh(self) -> None:
        return None


def whole(shape: tuple[int, ...]) -> Slices:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


@lru_cache(maxsize=64)
def _cached_shards(config: ModelConfig, parallel: ParallelConfig, rank: int) -> dict[str, ParameterShard]:
    return plan_shards(config, parallel, rank)


def stages_of(name: str, config: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """The pipeline stages that hold a parameter; a tied embedding is on the first and on the last."""
    _, layer = split_layer(name)
    last = parallel.pp - 1
    if layer is not None:
        return _stages_of_layers(config, parallel).get(layer, ())
    if name.startswith("model.tok_embeddings"):
        return (0, last) if config.tie_word_embeddings and last else (0,)
    return (last,)


@lru_cache(maxsize=64)
def _stages_of_layers(config: ModelConfig, parallel: ParallelConfig) -> dict[int, tuple[int, ...]]:
    return {layer: (stage,) for stage, layers in enumerate(parallel.stage_layers(config)) for layer in layers}


def split_axes(name: str) -> tuple[str | None, ...]:
    """The row of the table for a parameter."""
    return LAYOUT[re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{}", name)]


def axis_parts(axis: str | None, config: ModelConfig, parallel: ParallelConfig) -> int:
    """Into how many parts an axis is split, by its entry in the table."""
    if axis == "kv":
        return min(parallel.tp, config.n_kv_heads)
    return parallel.tp if axis == "tp" or (axis == "vocab" and parallel.vocab_parallel) else 1


def _shard(
    name: str, shape: tuple[int, ...], config: ModelConfig, parallel: ParallelConfig, at: Coordinates
) -> ParameterShard:
    parts, slices, copies = [], [], 1
    for size, axis in zip(shape, split_axes(name), strict=True):
        count = axis_parts(axis, config, parallel)
        if axis == "kv":
            copies = parallel.tp // count
        index = at.tp * count // parallel.tp
        parts.append(count)
        slices.append(slice(index * size // count, (index + 1) * size // count))
    optimizer = list(slices)
    rows = slices[0].stop - slices[0].start
    if parallel.shard_optimizer and rows % parallel.dp == 0:
        start = slices[0].start + at.dp * (rows // parallel.dp)
        optimizer[0] = slice(start, start + rows // parallel.dp)
    return ParameterShard(name, shape, tuple(parts), tuple(slices), copies, tuple(optimizer))


def describe(config: ModelConfig, parallel: ParallelConfig) -> str:
    """A table of every kind of parameter: full shape, shape on one rank, what splits it, which stages hold it."""
    mesh = " x ".join(f"{axis}={getattr(parallel, axis)}" for axis in AXES)
    lines = [f"{config.num_parameters:,} parameters over {mesh} = {parallel.world_size} ranks"]
    rows = [("parameter", "shape", "on a rank", "split by", "stages")]
    seen = set()
    for stage in range(parallel.pp):
        shards = plan_shards(config, parallel, parallel.rank(Coordinates(stage, 0, 0, 0)))
        for name, shard in shards.items():
            pattern = re.sub(r"(?<=\.layers\.)\d+(?=\.)", "*", name)
            if pattern in seen:
                continue
            seen.add(pattern)
            axes = zip(split_axes(name), shard.parts, strict=True)
            split = ", ".join(str(axis) if parts > 1 else "-" for axis, parts in axes)
            copies = f" ({shard.copies} copies)" if shard.copies > 1 else ""
            stages = "by layer" if "*" in pattern else ", ".join(map(str, stages_of(name, config, parallel)))
            rows.append((pattern, _shape(shard.full_shape), _shape(shard.shape), split + copies, stages))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    parts = [f"{part.start}-{part.stop - 1}" for part in parallel.part_layers(config)]
    layers = ", ".join(" and ".join(parts[stage :: parallel.pp]) for stage in range(parallel.pp))
    words: dict[str | None, str] = {None: "-", "tokens": "cp and tp" if parallel.sequence_parallel else "cp"}
    activations = "; ".join(
        f"{name} {', '.join(words.get(axis, str(axis)) for axis in row)}" for name, row in ACTIVATIONS.items()
    )
    return "\n".join([*lines, f"layers of each stage: {layers}", f"activations: {activations}"])


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
