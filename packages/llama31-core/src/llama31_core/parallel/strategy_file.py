"""MindSpore's strategy files, which its own checkpoint tools read: a layout in and files out, and files in and a layout
out.

A parameter's layout there is a device matrix and, for each of its axes, which axis of that matrix splits it, counted
from the right; -1 is none (`mindspore/train/node_strategy_pb2`). Moments that are split over dp on top of an axis that
tp splits are "optimizer shards" of `opt_weight_shard_size` ranks, `opt_weight_shard_step` apart. One file describes one
pipeline stage; `mindspore.merge_pipeline_strategys` joins them and then writes `<stage>-<name>`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.names import is_training_state
from llama31_core.checkpoint.staging import staged_file
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.layout import ParameterShard, Slices, plan_shards, whole
from llama31_core.parallel.mesh import Coordinates, ParallelConfig

_NOT_SPLIT = -1
_MOMENTS = ("adam_mean.", "adam_variance.")
_STAGED_NAME = re.compile(r"(\d+)-(.+)", re.DOTALL)
_MAX_DEVICES = 1 << 20


@dataclass(frozen=True)
class ParameterStrategy:
    """A parameter's layout within a stage, as a strategy file says it.

    Attributes:
        dev_matrix: sizes of the device matrix; a rank's place in it is row-major.
        tensor_map: for each axis of the parameter the axes of the matrix that split it, outermost first, counted from
            the right.
        opt_step, opt_size: every `opt_step`-th rank, `opt_size` of them, share out the first axis once more.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    opt_step: int = 0
    opt_size: int = 0

    @property
    def num_devices(self) -> int:
        """Ranks of the stage."""
        return math.prod(self.dev_matrix)

    def parts(self) -> tuple[int, ...]:
        """Into how many parts each axis is split."""
        parts = [math.prod(self.dev_matrix[-1 - axis] for axis in axes) for axes in self.tensor_map]
        return (parts[0] * self.opt_parts(), *parts[1:]) if parts else ()

    def opt_parts(self) -> int:
        """Into how many parts the first axis is split once more."""
        return self.opt_size if self.opt_step and self.opt_size else 1

    def index(self, local_rank: int) -> tuple[int, ...]:
        """Which part of each axis a rank of the stage holds."""
        place, rest = [], local_rank
        for size in reversed(self.dev_matrix):
            rest, own = divmod(rest, size)
            place.append(own)
        result = []
        for axes in self.tensor_map:
            part = 0
            for axis in axes:
                part = part * self.dev_matrix[-1 - axis] + place[axis]
            result.append(part)
        if result and self.opt_parts() > 1:
            result[0] = result[0] * self.opt_size + local_rank // self.opt_step % self.opt_size
        return tuple(result)


@dataclass(frozen=True)
class StrategyLayout:
    """The layout that strategy files describe (a `Layout`).

    Attributes:
        source: where it was read.
        stages: for every pipeline stage the layouts of its parameters.
    """

    source: Path
    stages: tuple[dict[str, ParameterStrategy], ...]

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
            if is_training_state(name):
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
            if is_training_state(name):
                return shape
            raise ConfigError(f"{self.source} does not say how {name} is split")
        parts = strategy.parts()
        if len(parts) != len(shape):
            raise ConfigError(f"{self.source} splits {len(parts)} axes of {name}, its shape on a rank is {shape}")
        return tuple(size * count for size, count in zip(shape, parts, strict=True))

    def mesh(self) -> None:
        return None


def save_strategy_files(
    directory: Path, config: ModelConfig, parallel: ParallelConfig, *, overwrite: bool = False
) -> list[Path]:
    """Write `ckpt_strategy_stage_N.ckpt` for every pipeline stage; `merge_pipeline_strategys` joins them.

    Raises:
        ConfigError: the model does not divide over the mesh, or moments are split in a way that such a file cannot say.
        CheckpointError: a file exists, or cannot be written.
    """
    contents = [build_strategy(config, parallel, stage) for stage in range(parallel.pp)]
    paths = [directory / f"ckpt_strategy_stage_{stage}.ckpt" for stage in range(parallel.pp)]
    for path, content in zip(paths, contents, strict=True):
        with staged_file(path, overwrite=overwrite) as part:
            part.write_bytes(content)
    return paths


def build_strategy(config: ModelConfig, parallel: ParallelConfig, stage: int) -> bytes:
    """The file of one stage: its parameters and their moments."""
    strategy = _protobuf().ParallelStrategyMap(current_stage=stage)
    for name, shard in plan_shards(config, parallel, parallel.rank(Coordinates(stage, 0, 0, 0))).items():
        own = _parameter_strategy(shard, parallel)
        moment = _moment_strategy(name, shard, own, parallel)
        for full_name, layout in ((name, own), *((prefix + name, moment) for prefix in _MOMENTS)):
            item = strategy.parallel_layout_item.add(param_name=full_name)
            layouts = item.parallel_layouts
            layouts.dev_matrix.add(dim=layout.dev_matrix)
            layouts.tensor_map.add(dim=[axes[0] if axes else _NOT_SPLIT for axes in layout.tensor_map])
            layouts.param_split_shape.add()
            layouts.indices_offset.add()
            layouts.field = 0
            layouts.opt_weight_shard_step = layout.opt_step
            layouts.opt_weight_shard_size = layout.opt_size
        # MindSpore's readers look for the stage in the operators' strategies and fail without any.
        operator = strategy.parallel_strategy_item.add(node_name=name)
        operator.parallel_strategys.stage = stage
        operator.parallel_strategys.parallel_strategy.add(dim=list(shard.parts))
    content: bytes = strategy.SerializeToString()
    return content


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
    files = sorted(path.glob("*.ckpt")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no strategy files (*.ckpt)")
    stages: dict[int, dict[str, ParameterStrategy]] = {}
    for file in files:
        for stage, parameters in _read_file(file).items():
            if stages.setdefault(stage, parameters) != parameters:
                raise ConfigError(f"{file} describes stage {stage} otherwise than a file before it in {path}")
    if sorted(stages) != list(range(len(stages))):
        raise ConfigError(f"{path} describes the pipeline stages {sorted(stages)}; files of other stages are missing")
    sizes = {strategy.num_devices for parameters in stages.values() for strategy in parameters.values()}
    if len(sizes) != 1:
        raise ConfigError(f"{path} gives stages of {sorted(sizes)} ranks; all must have as many")
    return StrategyLayout(path, tuple(stages[stage] for stage in range(len(stages))))


def _read_file(path: Path) -> dict[int, dict[str, ParameterStrategy]]:
    """Stage -> name -> layout."""
    strategy = _protobuf().ParallelStrategyMap()
    try:
        strategy.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, which has another module in each of its implementations
        raise ConfigError(f"{path} is no MindSpore strategy file: {error}") from error
    operators = strategy.parallel_strategy_item
    own_stage = operators[0].parallel_strategys.stage if operators else 0  # of a file that is not merged
    stages: dict[int, dict[str, ParameterStrategy]] = {}
    for item in strategy.parallel_layout_item:
        staged = _STAGED_NAME.fullmatch(item.param_name)
        stage, name = (int(staged[1]), staged[2]) if staged else (own_stage, item.param_name)
        stages.setdefault(stage, {})[name] = _read_layout(path, name, item.parallel_layouts)
    if not stages:
        raise ConfigError(f"{path} is no MindSpore strategy file, or an empty one")
    return stages


def _read_layout(path: Path, name: str, layouts: Any) -> ParameterStrategy:
    matrix = tuple(layouts.dev_matrix[0].dim) if layouts.dev_matrix else ()
    maps = [tuple(entry.dim) for entry in layouts.tensor_map]
    # One list for all axes; or, where an axis is split by several of the matrix's, a list for each axis.
    axes = [entry for entry in maps if entry] if len(maps) > 1 else [(axis,) for entry in maps for axis in entry]
    tensor_map = tuple(tuple(axis for axis in entry if axis != _NOT_SPLIT) for entry in axes)
    step, size = layouts.opt_weight_shard_step, layouts.opt_weight_shard_size
    sound = all(extent > 0 for extent in matrix) and 0 < math.prod(matrix) <= _MAX_DEVICES
    if not matrix or not sound or any(not 0 <= axis < len(matrix) for entry in tensor_map for axis in entry):
        raise ConfigError(f"{path}: {name} has device matrix {matrix} and tensor map {axes}, which do not fit")
    strategy = ParameterStrategy(matrix, tensor_map, step, size)
    if size == -1:  # all ranks that hold the same part
        size = strategy.num_devices // math.prod(ParameterStrategy(matrix, tensor_map).parts())
        strategy = ParameterStrategy(matrix, tensor_map, step, size)
    if step < 0 or size < 0 or math.prod(strategy.parts()) > strategy.num_devices:
        raise ConfigError(f"{path}: {name} has optimizer shards of step {step} and size {size}, which do not fit")
    return strategy


def _protobuf() -> Any:
    from mindspore.train import node_strategy_pb2  # MindSpore: seconds to import

    return node_strategy_pb2
