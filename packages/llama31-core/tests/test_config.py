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


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),  # 8 key-value heads
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    assert ModelConfig.preset(name).num_parameters == count


def test_every_preset_has_its_count_checked() -> None:
    # tiny: 2 x 512 x 64, two layers of 64 x 16 x 12 + 3 x 64 x 160 + 2 x 64, and 64
    assert ModelConfig.preset("tiny").num_parameters == 65_536 + 2 * (12_288 + 30_720 + 128) + 64


@pytest.mark.parametrize("name", PRESETS)
def test_mindformers_form_round_trips(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    values = json.loads(config.save_pretrained(tmp_path, form="mindformers").read_text())
    assert (values["model_type"], values["num_layers"]) == ("llama", config.n_layers)
    assert values["extend_method"] == ("LLAMA3" if config.rope_scaling else "None")
    assert ModelConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_headz": 4}, "unknown key 'num_headz'; did you mean 'num_heads'"),
        ({"qkv_has_bias": True}, "qkv_has_bias is True"),
        ({"extend_method": "PI"}, "extend_method is 'PI'"),
        ({"hidden_size": None}, "missing hidden_size"),
    ],
)
def test_bad_mindformers_files_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = ModelConfig.preset("tiny").save_pretrained(tmp_path, form="mindformers")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_pretrained(tmp_path)


def test_a_head_width_that_mindformers_cannot_say_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=8, dim=64, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=32, ffn_dim=8)
    with pytest.raises(ConfigError, match="head_dim is 32"):
        config.save_pretrained(tmp_path, form="mindformers")
    assert not list(tmp_path.iterdir())


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
        ({"num_hidden_layers": 10**9}, "n_layers: must be at most 10000, got 1000000000"),
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
