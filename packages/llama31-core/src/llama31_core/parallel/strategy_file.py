"""MindSpore's strategy files, which its own checkpoint tools read: a layout in, one file per pipeline stage out.

A parameter's layout there is a device matrix (here dp, cp, tp) and, for each of its axes, which axis of that matrix
splits it, counted from the right; -1 is none (`mindspore/train/node_strategy_pb2`).
"""

from __future__ import annotations

from pathlib import Path

from llama31_core.checkpoint.staging import staged_file
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.layout import ParameterShard, plan_shards
from llama31_core.parallel.mesh import Coordinates, ParallelConfig

_TP_FROM_THE_RIGHT = 0
_NOT_SPLIT = -1


def save_strategy_files(directory: Path, config: ModelConfig, parallel: ParallelConfig) -> list[Path]:
    """Write `ckpt_strategy_stage_N.ckpt` for every pipeline stage; `merge_pipeline_strategys` joins them.

    Raises:
        ConfigError: key-value heads are copied between tp ranks, which such a file cannot say.
    """
    paths = []
    for stage in range(parallel.pp):
        path = directory / f"ckpt_strategy_stage_{stage}.ckpt"
        with staged_file(path, overwrite=True) as part:
            part.write_bytes(build_strategy(config, parallel, stage))
        paths.append(path)
    return paths


def build_strategy(config: ModelConfig, parallel: ParallelConfig, stage: int) -> bytes:
    """The file of one stage."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap  # MindSpore: seconds to import

    strategy = ParallelStrategyMap(current_stage=stage)
    for name, shard in plan_shards(config, parallel, parallel.rank(Coordinates(stage, 0, 0, 0))).items():
        if shard.copies > 1:
            raise ConfigError(
                f"{name}: {config.n_kv_heads} key-value heads over tp={parallel.tp} are copied between ranks, which a "
                f"MindSpore strategy file cannot say; use tp <= {config.n_kv_heads}"
            )
        item = strategy.parallel_layout_item.add(param_name=f"{stage}-{name}" if parallel.pp > 1 else name)
        layouts = item.parallel_layouts
        layouts.dev_matrix.add(dim=[parallel.dp, parallel.cp, parallel.tp])
        layouts.tensor_map.add(dim=_tensor_map(shard))
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        layouts.opt_weight_shard_step = 0
        layouts.opt_weight_shard_size = 0
        # MindSpore's readers look for the stage in the operators' strategies and fail without any.
        operator = strategy.parallel_strategy_item.add(node_name=name)
        operator.parallel_strategys.stage = stage
        operator.parallel_strategys.parallel_strategy.add(dim=list(shard.parts))
    content: bytes = strategy.SerializeToString()
    return content


def _tensor_map(shard: ParameterShard) -> list[int]:
    return [_TP_FROM_THE_RIGHT if parts > 1 else _NOT_SPLIT for parts in shard.parts]
