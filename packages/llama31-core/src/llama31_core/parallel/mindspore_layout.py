"""The layout table as MindSpore says it: a parameter's or activation's name in, a `mindspore.parallel.Layout` out."""

from __future__ import annotations

from mindspore.parallel import Layout

from llama31_core.config import ModelConfig
from llama31_core.parallel.layout import ACTIVATIONS, split_axes
from llama31_core.parallel.mesh import ParallelConfig

# MindSpore has a layout for each pipeline stage; of its devices tp is the innermost axis, in two parts: ranks with
# different key-value heads, and ranks with copies of one.
AXIS_NAMES = ("dp", "cp", "kv", "copy")


def mindspore_layout(name: str, config: ModelConfig, parallel: ParallelConfig, stage: int = 0) -> Layout:
    """The layout of a parameter or an activation over the ranks of a pipeline stage.

    Raises:
        KeyError: the table has no such row.
    """
    kv = min(parallel.tp, config.n_kv_heads)
    sizes = (parallel.dp, parallel.cp, kv, parallel.tp // kv)
    per_stage = parallel.world_size // parallel.pp
    ranks = list(range(stage * per_stage, (stage + 1) * per_stage))
    row = ACTIVATIONS[name] if name in ACTIVATIONS else split_axes(name)
    return Layout(sizes, AXIS_NAMES, rank_list=ranks)(*(_axes(axis, parallel) for axis in row))


def _axes(axis: str | None, parallel: ParallelConfig) -> str | tuple[str, ...]:
    """MindSpore's names of what splits an axis, the outermost first."""
    if axis in ("dp", "cp", "kv"):
        return axis
    if axis == "tokens":
        return ("cp", "kv", "copy") if parallel.sequence_parallel else "cp"
    is_split = axis == "tp" or (axis == "vocab" and parallel.vocab_parallel)
    return ("kv", "copy") if is_split else "None"
