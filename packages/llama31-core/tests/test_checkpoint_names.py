"""The name table is a bijection, and covers just what a configuration has."""

from __future__ import annotations

import math

import pytest

from llama31_core.checkpoint.names import (
    FUSED,
    NAME_TABLE,
    SCHEMES,
    Scheme,
    canonical_name,
    is_ignorable,
    rotary_heads,
    spell,
    split_layer,
)
from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.presets import PRESETS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_comes_back_from_every_spelling(scheme: Scheme) -> None:
    names = list(parameter_shapes(ModelConfig.preset("llama3.1-8b")))
    spelled = [spell(name, scheme) for name in names]
    assert len(set(spelled)) == len(names)
    assert [canonical_name(name, scheme) for name in spelled] == names


def test_no_two_rows_share_a_name() -> None:
    for scheme in SCHEMES:
        assert len({getattr(row, scheme) for row in NAME_TABLE}) == len(NAME_TABLE)


@pytest.mark.parametrize(
    ("canonical", "hf", "gguf", "meta"),
    [
        (
            "model.layers.17.attention.wk.weight",
            "model.layers.17.self_attn.k_proj.weight",
            "blk.17.attn_k.weight",
            "layers.17.attention.wk.weight",
        ),
        (
            "model.layers.0.feed_forward.w2.weight",
            "model.layers.0.mlp.down_proj.weight",
            "blk.0.ffn_down.weight",
            "layers.0.feed_forward.w2.weight",
        ),
        ("model.norm_out.weight", "model.norm.weight", "output_norm.weight", "norm.weight"),
        ("lm_head.weight", "lm_head.weight", "output.weight", "output.weight"),
    ],
)
def test_known_spellings(canonical: str, hf: str, gguf: str, meta: str) -> None:
    assert [spell(canonical, scheme) for scheme in SCHEMES] == [canonical, hf, gguf, meta]


@pytest.mark.parametrize(
    "name",
    ["model.layers.07.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weightx", ""],
)
def test_other_names_are_unknown(name: str) -> None:
    assert canonical_name(name, "hf") is None
    with pytest.raises(KeyError):
        spell(name, "hf")


def test_only_queries_and_keys_are_rotary() -> None:
    names = list(parameter_shapes(ModelConfig.preset("tiny")))
    found = {name.split(".", 3)[3]: rotary_heads(name) for name in names if rotary_heads(name)}
    assert found == {"attention.wq.weight": "n_heads", "attention.wk.weight": "n_kv_heads"}


def test_parts_of_fused_tensors_are_in_the_table() -> None:
    for template, parts in FUSED.items():
        assert split_layer(template.replace("{n}", "3")) == (template, 3)
        assert all(canonical_name(f"model.layers.3.{part}.weight", "mindformers") for part in parts)


@pytest.mark.parametrize(
    ("name", "ignorable"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("rope.freqs", True),
        ("adam_m.model.layers.0.attention.wq.weight", True),
        ("global_step", True),
        ("model.layers.3.attention.wq.weight", False),
        ("adam", False),
    ],
)
def test_what_is_no_weight(name: str, ignorable: bool) -> None:
    assert is_ignorable(name) is ignorable


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_shapes_add_up_to_the_parameter_count(preset: str) -> None:
    config = ModelConfig.preset(preset)
    assert sum(map(math.prod, parameter_shapes(config).values())) == config.num_parameters
