"""A rank reads its slices of a checkpoint, whole or split, and no other bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.checkpoint import save_weights
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.parallel import ParallelConfig, plan_shards
from llama31_core.parallel.run import check_split, load_slices

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


def test_a_rank_reads_its_slices_alone(model: tuple[Path, ModelConfig, Values]) -> None:
    directory, config, values = model
    for rank in range(PARALLEL.world_size):
        shards = plan_shards(config, PARALLEL, rank)
        taken = Taken(list(shards))
        num_bytes = load_slices(cast(Any, taken), directory, shards, rank)
        assert num_bytes == sum(4 * prod(shard.shape) for shard in shards.values())
        for name, shard in shards.items():
            np.testing.assert_array_equal(taken.values[name], values[name][shard.slices])


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
