"""ModelConfig: parameter counts, HF form both ways, strictness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_equal_transformers(name: str, tmp_path: Path) -> None:
    PRESETS[name].save_pretrained(tmp_path)
    with torch.device("meta"):  # shapes without memory
        model = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path))
    assert PRESETS[name].num_parameters == sum(p.numel() for p in model.parameters())


def test_published_parameter_counts() -> None:
    assert ModelConfig.preset("llama3.1-8b").num_parameters == 8_030_261_248
    assert ModelConfig.preset("llama3.1-70b").num_parameters == 70_553_706_496


@pytest.mark.parametrize("name", PRESETS)
def test_hf_form_round_trips_also_through_transformers(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    config.save_pretrained(tmp_path / "ours")
    assert ModelConfig.from_pretrained(tmp_path / "ours") == config
    AutoConfig.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert ModelConfig.from_pretrained(tmp_path / "theirs") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 64}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "64"}, "dim"),
        ({"hidden_size": 63}, "multiple of n_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of n_kv_heads=3"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type llama3"),
        ({"eos_token_id": 512}, "not in the vocabulary"),
        ({"vocab_size": 0}, "must be positive"),
    ],
)
def test_bad_files_are_refused_by_file_and_key(change: dict[str, object], message: str, tmp_path: Path) -> None:
    values = ModelConfig.preset("tiny").to_hf() | change
    if "hidden_size" in change:
        values["head_dim"] = None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama"}'])
def test_files_that_are_not_a_config_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.from_pretrained(tmp_path)
