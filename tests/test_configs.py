"""Every file in configs/ loads without a warning and describes the model and the mesh that its name says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.run_config import PredictConfig, RunConfig, load_predict_config, load_run_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MESHES = {
    "predict_llama3_1_8b": ParallelConfig(),
    "predict_llama3_1_70b": ParallelConfig(tp=4, vocab_parallel=False),
    "predict_llama3_1_405b": ParallelConfig(tp=16, vocab_parallel=False),
    "finetune_llama3_1_8b": ParallelConfig(dp=8, vocab_parallel=False, shard_optimizer=True, shard_gradients=True),
    "finetune_llama3_1_70b": ParallelConfig(tp=8, pp=8, sequence_parallel=True, shard_optimizer=True),
    "finetune_llama3_1_405b": ParallelConfig(dp=2, tp=8, pp=18, sequence_parallel=True, shard_optimizer=True),
}


def load(path: Path) -> PredictConfig | RunConfig:
    return load_predict_config(path) if path.stem.startswith("predict") else load_run_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_without_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = load(path)
    assert not caplog.records
    assert run.load_checkpoint == ""


@pytest.mark.parametrize("name", MESHES)
def test_architecture_and_mesh_are_those_of_the_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    run = load(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    preset = ModelConfig.preset("llama3.1-" + name.rpartition("_")[2])
    assert run.model_section.architecture(name) == preset
    run.model_section.check_against(preset, name)
    assert not caplog.records
    assert run.parallel == MESHES[name]
    run.parallel.check(preset)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_json_is_written_from_it_as_mindie_wants(path: Path, tmp_path: Path) -> None:
    if "smollm2" in path.stem:
        with pytest.raises(ConfigError, match="missing hidden_size, num_layers, num_heads, vocab_size"):
            ModelConfig.from_pretrained(path)
        return
    config = ModelConfig.from_pretrained(path)
    config.save_pretrained(tmp_path, form="mindformers")
    assert ModelConfig.from_pretrained(tmp_path) == config


def test_both_tiny_files_are_the_tiny_preset() -> None:
    tiny = {path.stem: load(path).model_section.architecture(path.stem) for path in CONFIGS if "tiny" in path.stem}
    for config in tiny.values():
        ids = {"bos_token_id": None, "eos_token_ids": (), "pad_token_id": None}
        assert config.model_copy(update=ids) == ModelConfig.preset("tiny")
    assert len(tiny) == 2


def test_a_file_of_the_other_kind_is_refused() -> None:
    by_name = {path.stem: path for path in CONFIGS}
    with pytest.raises(ConfigError, match="run_mode"):
        load_run_config(by_name["predict_llama3_1_8b"], ["lr_schedule.learning_rate=1.0", "model={}", "processor={}"])
    with pytest.raises(ConfigError, match="unknown key"):
        load_predict_config(by_name["finetune_llama3_1_8b"])
