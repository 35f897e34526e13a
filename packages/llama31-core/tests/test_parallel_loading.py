"""A rank reads its slices of a checkpoint, whole or split, and no other bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.checkpoint import save_weights
from llama31_core.checkpoint.names import fused_name
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.cache_plan import plan_cache
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.parallel_part import PartRunner
from llama31_core.inference.runner import GraphRunner
from llama31_core.parallel import ParallelConfig, plan_shards
from llama31_core.parallel.groups import Groups
from llama31_core.parallel.run import check_split, load_slices
from llama31_core.precision import Precision

Values = dict[str, npt.NDArray[np.float32]]
PARALLEL = ParallelConfig(tp=2, pp=2, dp=2)


class Taken:
    """In the place of a rank's weights."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.values = names, dict[str, Any]()

    def load(self, read: Callable[[str], npt.NDArray[np.generic]]) -> None:
        self.values = {name: read(name) for name in self.names}


@pytest.fixture
def model(tmp_path: Path, random_weights: Callable[..., Values]) -> tuple[Path, ModelConfig, Values]:
    config = ModelConfig.preset("tiny")
    values = random_weights(config)
    save_weights(tmp_path, values.items())
    return tmp_path, config, values


def check_slices(directory: Path, config: ModelConfig, values: Values) -> None:
    """Every rank takes its parts of the values, and reads no other bytes."""
    for rank in range(PARALLEL.world_size):
        shards = plan_shards(config, PARALLEL, rank)
        taken = Taken(list(shards))
        num_bytes = load_slices(cast(Any, taken), directory, shards, rank)
        assert num_bytes == sum(4 * prod(shard.shape) for shard in shards.values())
        for name, shard in shards.items():
            np.testing.assert_array_equal(taken.values[name], values[name][shard.slices])


def test_a_rank_reads_its_slices_alone(model: tuple[Path, ModelConfig, Values]) -> None:
    check_slices(*model)


def test_of_stacked_weights_too(model: tuple[Path, ModelConfig, Values]) -> None:
    """MindFormers' qkv_concat form: w_qkv, and w_gate_hidden."""
    whole, config, values = model
    directory = whole / "stacked"
    directory.mkdir()
    stored: dict[str, list[npt.NDArray[np.float32]]] = {}
    for name, value in values.items():
        stored.setdefault(fused_name(name), []).append(value)
    assert len(stored) < len(values)
    save_weights(directory, ((name, np.concatenate(parts)) for name, parts in stored.items()))
    check_slices(directory, config, values)


def test_another_architecture_is_refused(model: tuple[Path, ModelConfig, Values]) -> None:
    directory, config, _ = model
    shards = plan_shards(config.model_copy(update={"vocab_size": 2 * config.vocab_size}), PARALLEL, 0)
    with pytest.raises(CheckpointError, match=r"tok_embeddings.*its config says"):
        load_slices(cast(Any, Taken(list(shards))), directory, shards, 0)


def test_numbers_that_are_none_are_refused(model: tuple[Path, ModelConfig, Values]) -> None:
    whole, config, values = model
    directory = whole / "broken"
    directory.mkdir()
    values["model.norm_out.weight"][0] = np.nan
    save_weights(directory, values.items())
    shards = plan_shards(config, PARALLEL, 7)
    with pytest.raises(CheckpointError, match=r"norm_out\.weight holds values that are no numbers"):
        load_slices(cast(Any, Taken(list(shards))), directory, shards, 7)


def test_auto_trans_ckpt_says_whether_a_whole_checkpoint_may_be_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is whole, and auto_trans_ckpt is False.*auto_trans_ckpt=True"):
        check_split(tmp_path, 0)
    (tmp_path / "rank_0").mkdir()
    check_split(tmp_path, 0)
    with pytest.raises(ConfigError, match="has no rank_1"):
        check_split(tmp_path, 1)


def test_a_rank_computes_with_bfloat16_weights_in_float32(
    tmp_path: Path, random_weights: Callable[..., Values], build_runner: Callable[..., GraphRunner]
) -> None:
    """As one process would with the portable kernels: a CPU's know no bfloat16."""
    config = ModelConfig.preset("tiny")
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_weights(config).items()}
    save_weights(tmp_path, stored.items())
    alone = ParallelConfig()
    plan = plan_cache(config, EngineOptions(num_blocks=8, block_size=4))
    groups = Groups(alone, 0, config.n_kv_heads)
    part = PartRunner(tmp_path, config, alone, groups, plan, Precision("bfloat16", "float32"))
    batch = ForwardInput([[5, 3, 8, 1, 2]], [0], [[2, 6]], [5])
    exact = {name: value.astype(np.float32) for name, value in stored.items()}
    want = build_runner(config, exact, num_blocks=8, block_size=4).forward(batch)
    np.testing.assert_allclose(part.forward(batch), want, atol=1e-6)
