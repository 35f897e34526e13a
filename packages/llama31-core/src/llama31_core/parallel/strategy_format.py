"""The two forms of a MindSpore strategy file, protobuf and JSON: a stage's layouts in and bytes out, and back.

MindSpore takes a file for JSON by its suffix `.json` and for protobuf (`mindspore/train/node_strategy_pb2`) otherwise.
A stage's parameters stand under their names; `mindspore.merge_pipeline_strategys` joins stages and then writes
`<stage>-<name>`. Both forms say the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.errors import CheckpointError, ConfigError

SUFFIXES = (".ckpt", ".json")
_NOT_SPLIT = -1
_STAGED_NAME = re.compile(r"(\d+)-(.+)", re.DOTALL)
_MAX_DEVICES = 1 << 20
_INT32 = range(-(2**31), 2**31)


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


def encode_protobuf(stage: int, parameters: Mapping[str, ParameterStrategy]) -> bytes:
    """A stage as a `.ckpt` strategy file. No axis may be split by several axes of the matrix."""
    strategy = _protobuf().ParallelStrategyMap(current_stage=stage)
    for name, layout in parameters.items():
        layouts = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add(dim=layout.dev_matrix)
        layouts.tensor_map.add(dim=_flat_map(layout))
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        layouts.opt_weight_shard_step = layout.opt_step
        layouts.opt_weight_shard_size = layout.opt_size
        # MindSpore's readers look for the stage in the operators' strategies and fail without any.
        operator = strategy.parallel_strategy_item.add(node_name=name)
        operator.parallel_strategys.stage = stage
        operator.parallel_strategys.parallel_strategy.add(dim=list(layout.parts()))
    content: bytes = strategy.SerializeToString()
    return content


def encode_json(stage: int, parameters: Mapping[str, ParameterStrategy]) -> bytes:
    """A stage as a `.json` strategy file, likewise."""
    layouts = {
        name: {
            "dev_matrix": list(layout.dev_matrix),
            "tensor_map": _flat_map(layout),
            "param_split_shape": [],
            "indices_offset": [],
            "field": 0,
            "opt_weight_shard_step": layout.opt_step,
            "opt_weight_shard_size": layout.opt_size,
        }
        for name, layout in parameters.items()
    }
    operators = {
        name: {"stage": stage, "parallel_strategy": [list(layout.parts())]} for name, layout in parameters.items()
    }
    content = {"current_stage": stage, "parallel_strategy_item": operators, "parallel_layout_item": layouts}
    return (json.dumps(content) + "\n").encode()


def _flat_map(layout: ParameterStrategy) -> list[int]:
    return [axes[0] if axes else _NOT_SPLIT for axes in layout.tensor_map]


def read_strategy(path: Path) -> dict[int, dict[str, ParameterStrategy]]:
    """Stage -> name -> layout, of a file of either form.

    Raises:
        ConfigError: no such file, another format, no layouts, or layouts that cannot be.
    """
    try:
        entries = _read_json(path) if path.suffix == ".json" else _read_protobuf(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    own_stage, layouts = entries
    stages: dict[int, dict[str, ParameterStrategy]] = {}
    for full_name, matrix, maps, step, size in layouts:
        staged = _STAGED_NAME.fullmatch(full_name)
        stage, name = (int(staged[1]), staged[2]) if staged else (own_stage, full_name)
        stages.setdefault(stage, {})[name] = _check_layout(path, name, matrix, maps, step, size)
    if not stages:
        raise ConfigError(f"{path} is no MindSpore strategy file, or an empty one")
    return stages


# Name, device matrix, for each axis of the parameter the matrix axes that split it (-1 is none), step and size of the
# optimiser shards.
_Layout = tuple[str, tuple[int, ...], list[tuple[int, ...]], int, int]


def _read_protobuf(path: Path) -> tuple[int, list[_Layout]]:
    strategy = _protobuf().ParallelStrategyMap()
    try:
        strategy.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, which has another module in each of its implementations
        raise ConfigError(f"{path} is no MindSpore strategy file: {error}") from error
    operators = strategy.parallel_strategy_item
    own_stage = operators[0].parallel_strategys.stage if operators else 0  # of a file that is not merged
    result: list[_Layout] = []
    for item in strategy.parallel_layout_item:
        layouts = item.parallel_layouts
        matrix = tuple(layouts.dev_matrix[0].dim) if layouts.dev_matrix else ()
        maps = [tuple(entry.dim) for entry in layouts.tensor_map]
        # One list for all axes; or, where an axis is split by several of the matrix's, a list for each axis.
        axes: list[tuple[int, ...]] = [entry for entry in maps if entry]
        if len(maps) == 1:
            axes = [(axis,) for axis in maps[0]]
        result.append((item.param_name, matrix, axes, layouts.opt_weight_shard_step, layouts.opt_weight_shard_size))
    return own_stage, result


def _read_json(path: Path) -> tuple[int, list[_Layout]]:
    content = read_json_object(path)
    layouts, operators = content.get("parallel_layout_item", {}), content.get("parallel_strategy_item") or {}
    if not isinstance(layouts, dict) or not isinstance(operators, dict):
        raise ConfigError(f"{path} is no MindSpore strategy file: its items are no JSON objects")
    first = next(iter(operators.values()), None)
    own_stage = first.get("stage", 0) if isinstance(first, dict) else 0
    result: list[_Layout] = []
    for name, entry in layouts.items():
        fields = entry if isinstance(entry, dict) else {}
        matrix, axes = fields.get("dev_matrix"), fields.get("tensor_map")
        step, size = fields.get("opt_weight_shard_step", 0), fields.get("opt_weight_shard_size", 0)
        nested = [axis if isinstance(axis, list) else [axis] for axis in axes] if isinstance(axes, list) else None
        if matrix is None or nested is None or not _are_numbers([matrix, *nested, [step, size, own_stage]]):
            raise ConfigError(f"{path}: {name} must have dev_matrix and tensor_map as lists of whole numbers")
        result.append((name, tuple(matrix), [tuple(axis) for axis in nested], step, size))
    return own_stage, result


def _are_numbers(lists: Sequence[object]) -> bool:
    return all(
        isinstance(numbers, list) and all(type(number) is int and number in _INT32 for number in numbers)
        for numbers in lists
    )


def _check_layout(
    path: Path, name: str, matrix: tuple[int, ...], axes: list[tuple[int, ...]], step: int, size: int
) -> ParameterStrategy:
    tensor_map = tuple(tuple(axis for axis in entry if axis != _NOT_SPLIT) for entry in axes)
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
    try:
        from mindspore.train import node_strategy_pb2  # MindSpore: seconds to import
    except ImportError as error:
        raise ConfigError(
            f"a strategy file as protobuf needs MindSpore ({error}); install mindspore, or use the JSON form"
        ) from error
    return node_strategy_pb2
