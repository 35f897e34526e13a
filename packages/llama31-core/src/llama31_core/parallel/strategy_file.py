"""MindSpore's strategy files, which its own checkpoint tools read: a layout in and files out, and files in and a layout
out.

A parameter's layout there is a device matrix and, for each of its axes, which axis of that matrix splits it, counted
from the right; -1 is none (`mindspore/train/node_strategy_pb2`). Moments that are split over dp on top of an axis that
tp splits are "optimizer shards" of `opt_weight_shard_size` ranks, `opt_weight_shard_step` apart. One file describes one
pipeline stage; `mindspore.merge_pipeline_strategys` joins them and then writes `<stage>-<name>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama31_core.checkpoint.names import fused_members, is_training_state, split_moment
from llama31_core.checkpoint.staging import staged_file
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.layout import ParameterShard, Slices, plan_shards, whole
from llama31_core.parallel.mesh import Coordinates, ParallelConfig
from llama31_core.parallel.strategy_format import (
    SUFFIXES,
    ParameterStrategy,
    encode_json,
    encode_protobuf,
    read_strategy,
)

_MOMENTS = ("adam_mean.", "adam_variance.")


@dataclass(frozen=True)
class StrategyLayout:
    """The layout that strategy files describe (a `Layout`).

    Attributes:
        source: where it was read.
        stages: for every pipeline stage the layouts of its parameters; of fused ones those of their parts, since a rank
            has a stack of its parts of them and not a part of the stack.
        qkv_concat: the files name fused parameters.
    """

    source: Path
    stages: tuple[dict[str, ParameterStrategy], ...]
    qkv_concat: bool = False

    @property
    def stage_size(self) -> int:
        """Ranks of one stage."""
        return next(strategy.num_devices for stage in self.stages for strategy in stage.values())

    @property
    def world_size(self) -> int:
        return self.stage_size * len(self.stages)

    def place(self, name: str, full_shape: tuple[int, ...], rank: int) -> Slices | None:
        """The part of a tensor that a rank holds; loop state (`global_step`) is whole on every rank.

        Raises:
            ConfigError: the files do not name the tensor, or it does not divide as they say.
        """
        stage, local_rank = divmod(rank, self.stage_size)
        if not any(name in parameters for parameters in self.stages):
            if _is_loop_state(name):
                return whole(full_shape)
            raise ConfigError(f"{self.source} does not say how {name} is split")
        strategy = self.stages[stage].get(name)
        if strategy is None:
            return None
        parts = strategy.parts()
        if len(parts) != len(full_shape) or any(size % count for size, count in zip(full_shape, parts, strict=True)):
            raise ConfigError(f"{self.source} splits {name} in {parts} parts, its shape is {full_shape}")
        sizes = (size // count for size, count in zip(full_shape, parts, strict=True))
        return tuple(
            slice(index * size, (index + 1) * size)
            for index, size in zip(strategy.index(local_rank), sizes, strict=True)
        )

    def full_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        strategy = next((parameters[name] for parameters in self.stages if name in parameters), None)
        if strategy is None:
            if _is_loop_state(name):
                return shape
            raise ConfigError(f"{self.source} does not say how {name} is split")
        parts = strategy.parts()
        if len(parts) != len(shape):
            raise ConfigError(f"{self.source} splits {len(parts)} axes of {name}, its shape on a rank is {shape}")
        return tuple(size * count for size, count in zip(shape, parts, strict=True))

    def mesh(self) -> None:
        return None


def _is_loop_state(name: str) -> bool:
    return is_training_state(name) and not split_moment(name)[0]


def save_strategy_files(
    directory: Path, config: ModelConfig, parallel: ParallelConfig, *, overwrite: bool = False, suffix: str = ".ckpt"
) -> list[Path]:
    """Write `ckpt_strategy_stage_N.ckpt` (or `.json`, by `suffix`) for every pipeline stage.

    MindSpore's `merge_pipeline_strategys` joins them.

    Raises:
        ConfigError: the model does not divide over the mesh, or moments are split in a way that such a file cannot say.
        CheckpointError: a file exists, or cannot be written.
    """
    contents = [build_strategy(config, parallel, stage, suffix=suffix) for stage in range(parallel.pp)]
    paths = [directory / f"ckpt_strategy_stage_{stage}{suffix}" for stage in range(parallel.pp)]
    for path, content in zip(paths, contents, strict=True):
        with staged_file(path, overwrite=overwrite) as part:
            part.write_bytes(content)
    return paths


def build_strategy(config: ModelConfig, parallel: ParallelConfig, stage: int, *, suffix: str = ".ckpt") -> bytes:
    """The file of one stage, in the form that its suffix says: its parameters and their moments."""
    parameters: dict[str, ParameterStrategy] = {}
    for name, shard in plan_shards(config, parallel, parallel.rank(Coordinates(stage, 0, 0, 0))).items():
        parameters[name] = _parameter_strategy(shard, parallel)
        moment = _moment_strategy(name, shard, parameters[name], parallel)
        parameters |= {prefix + name: moment for prefix in _MOMENTS}
    return encode_json(stage, parameters) if suffix == ".json" else encode_protobuf(stage, parameters)


def _parameter_strategy(shard: ParameterShard, parallel: ParallelConfig) -> ParameterStrategy:
    # With more ranks than key-value heads, the tp axis is one of heads and one of their copies.
    copies = shard.copies
    matrix: tuple[int, ...] = (parallel.dp, parallel.cp, parallel.tp)
    if copies > 1:
        matrix = (parallel.dp, parallel.cp, parallel.tp // copies, copies)
    tp_from_the_right = len(matrix) - 3
    return ParameterStrategy(matrix, tuple((tp_from_the_right,) if parts > 1 else () for parts in shard.parts))


def _moment_strategy(
    name: str, shard: ParameterShard, own: ParameterStrategy, parallel: ParallelConfig
) -> ParameterStrategy:
    if shard.optimizer_slices == shard.slices:
        return own
    if shard.parts[0] == 1:  # dp splits the axis by itself
        dp_from_the_right = len(own.dev_matrix) - 1
        return ParameterStrategy(own.dev_matrix, ((dp_from_the_right,), *own.tensor_map[1:]))
    if parallel.cp > 1 or shard.copies > 1:
        raise ConfigError(
            f"moments of {name} are split over dp={parallel.dp} between ranks that cp={parallel.cp} or the "
            f"{shard.copies} copies of a head hold alike, which a MindSpore strategy file cannot say; "
            "leave shard_optimizer out"
        )
    return ParameterStrategy(own.dev_matrix, own.tensor_map, parallel.tp, parallel.dp)


def load_strategy(path: Path) -> StrategyLayout:
    """Read a strategy file, ours or MindSpore's, or a directory with one for each stage or rank.

    Raises:
        ConfigError: no such file, no strategy, stages are missing, or files of one stage differ.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for suffix in SUFFIXES for file in path.glob(f"*{suffix}"))
    if not files:
        raise ConfigError(f"{path} holds no strategy files (*.ckpt or *.json)")
    stages: dict[int, dict[str, ParameterStrategy]] = {}
    for file in files:
        for stage, parameters in read_strategy(file).items():
            if stages.setdefault(stage, parameters) != parameters:
                raise ConfigError(f"{file} describes stage {stage} otherwise than a file before it in {path}")
    if sorted(stages) != list(range(len(stages))):
        raise ConfigError(f"{path} describes the pipeline stages {sorted(stages)}; files of other stages are missing")
    sizes = {strategy.num_devices for parameters in stages.values() for strategy in parameters.values()}
    if len(sizes) != 1:
        raise ConfigError(f"{path} gives stages of {sorted(sizes)} ranks; all must have as many")
    names = {name for parameters in stages.values() for name in parameters}
    return StrategyLayout(
        path,
        tuple(_unfused(stages[stage]) for stage in range(len(stages))),
        qkv_concat=any(fused_members(name) != (name,) for name in names),
    )


def _unfused(parameters: dict[str, ParameterStrategy]) -> dict[str, ParameterStrategy]:
    result: dict[str, ParameterStrategy] = {}
    for name, strategy in parameters.items():
        members = fused_members(name)
        # A fused moment that is split once more over dp has rows of one part only; no layout of the parts says that.
        if members == (name,) or strategy == parameters.get(split_moment(name)[1]):
            result |= dict.fromkeys(members, strategy)
    return result
