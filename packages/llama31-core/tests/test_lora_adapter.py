"""Adapters from disk to slots: what is read, what is refused and why, and which slot each has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.checkpoint import save_weights
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError, RequestError
from llama31_core.lora.adapter import PREFIX, LowRank, read_adapter
from llama31_core.lora.table import AdapterTable

CONFIG = ModelConfig(vocab_size=64, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24)
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q_PROJ: (16, 16), DOWN_PROJ: (16, 24)}
AdapterBuilder = Callable[..., Path]


@pytest.fixture
def build_adapter(tmp_path: Path) -> AdapterBuilder:
    """Writes an adapter of two modules as PEFT's save_pretrained does; `ranks` and `extra` change its matrices."""

    def build(
        name: str = "adapter",
        ranks: Mapping[str, int] | None = None,
        extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
        seed: int = 0,
        **config: Any,
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
        (path / "adapter_config.json").write_text(json.dumps({**values, **config}))
        rng = np.random.default_rng(seed)
        stored = {}
        for module, (rows, columns) in SHAPES.items():
            rank = (ranks or {}).get(module, 2)
            stored[f"{PREFIX}{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
            stored[f"{PREFIX}{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
        save_weights(path / "adapter_model.safetensors", (stored | dict(extra or {})).items())
        return path

    return build


class Slots:
    """Notes what each slot holds."""

    def __init__(self) -> None:
        self.changed: dict[int, set[str]] = {}

    def write(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        self.changed[slot] = set(changes)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4 / 2**0.5, 4 / 2**0.5)),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "proj": 9}}, (1.5, 2.0)),
        ({"alpha_pattern": {".*_proj": 6}}, (3.0, 3.0)),
        ({"rank_pattern": {"down_proj": 8}, "ranks": {DOWN_PROJ: 8}}, (2.0, 0.5)),
        ({"target_modules": r".*(q_proj|down_proj)"}, (2.0, 2.0)),
    ],
)
def test_scales_and_ranks_are_those_of_the_patterns(
    settings: dict[str, Any], scales: tuple[float, float], build_adapter: AdapterBuilder
) -> None:
    changes = read_adapter(build_adapter(**settings)).changes
    assert set(changes) == {"model.layers.0.attention.wq.weight", "model.layers.1.feed_forward.w2.weight"}
    assert [change.scale for change in changes.values()] == pytest.approx(scales)
    assert [change.shape for change in changes.values()] == [(16, 16), (16, 24)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only plain LoRA"),
        ({"use_dora": True}, "scales the base weights"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole weights, which several adapters beside one base cannot"),
        ({"trainable_token_indices": [1]}, "rows of the embedding"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": "2"}, "r of model.layers.0.self_attn.q_proj is '2', expected an integer"),
        ({"r": 3}, "has rank 2, adapter_config.json says 3"),
        ({"lora_alpha": None}, "lora_alpha of model.layers.0.self_attn.q_proj is None, expected a number"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], expected an object"),
        ({"target_modules": ["q_proj"]}, "but there are matrices for model.layers.1.mlp.down_proj"),
        ({"extra": {f"{PREFIX}{Q_PROJ}.lora_A.weight": np.full((2, 16), np.inf, np.float32)}}, "are not finite"),
        ({"extra": {f"{PREFIX}{Q_PROJ}.lora_A.weight": np.ones((3, 16), np.float32)}}, "do not fit each other"),
        ({"extra": {f"{PREFIX}lm_head.lora_embedding_A": np.ones((2, 2), np.float32)}}, "is no LoRA matrix"),
        ({"extra": {f"{PREFIX}model.x.lora_A.weight": np.ones((2, 2), np.float32)}}, "which no Llama model has"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(
    settings: dict[str, Any], message: str, build_adapter: AdapterBuilder
) -> None:
    with pytest.raises(CheckpointError) as error:
        read_adapter(build_adapter(**settings))
    assert message in str(error.value)


def test_a_missing_adapter_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path)


def test_the_digest_is_of_what_the_adapter_computes(build_adapter: AdapterBuilder) -> None:
    first, same = read_adapter(build_adapter("a")), read_adapter(build_adapter("b", inference_mode=True))
    assert first.digest == same.digest
    assert first.digest != read_adapter(build_adapter("c", seed=1)).digest
    assert first.digest != read_adapter(build_adapter("d", lora_alpha=8)).digest


def test_slots_are_given_and_taken_back(build_adapter: AdapterBuilder) -> None:
    slots = Slots()
    table = AdapterTable(CONFIG, slots, max_loras=2, max_lora_rank=4)
    one = table.load("one", read_adapter(build_adapter("a")))
    two = table.load("two", read_adapter(build_adapter("b", seed=1)))
    assert (one.slot, two.slot) == (1, 2)
    assert table.find("two") == two
    with pytest.raises(ConfigError, match=r"all 2 slots are taken \(one, two\)"):
        table.load("three", read_adapter(build_adapter("c")))
    with pytest.raises(RequestError, match="used by a running request"):
        table.unload("one", lambda adapter: adapter.name == "one")
    table.unload("one", lambda adapter: False)
    assert slots.changed[1] == set()
    with pytest.raises(RequestError, match=r"adapter 'one' is not loaded; loaded are 'two'"):
        table.find("one")
    assert table.load("three", read_adapter(build_adapter("d"))).slot == 1
    assert [adapter.name for adapter in table.loaded] == ["two", "three"]


@pytest.mark.parametrize(
    ("name", "config", "settings", "error", "message"),
    [
        ("", CONFIG, {}, ConfigError, "name is empty"),
        ("x", CONFIG, {"r": 8, "ranks": {Q_PROJ: 8, DOWN_PROJ: 8}}, CheckpointError, "rank 8, allowed is 4; raise"),
        ("x", CONFIG.model_copy(update={"ffn_dim": 32}), {}, CheckpointError, "in this model it is (16, 32)"),
        ("x", CONFIG.model_copy(update={"n_layers": 1}), {}, CheckpointError, "changes model.layers.1.feed_forward.w2"),
        (
            "x",
            CONFIG,
            {
                "target_modules": ".*",
                "extra": {
                    f"{PREFIX}lm_head.lora_A.weight": np.ones((2, 16), np.float32),
                    f"{PREFIX}lm_head.lora_B.weight": np.ones((64, 2), np.float32),
                },
            },
            CheckpointError,
            "changes lm_head.weight; the projections of this model's layers alone",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_takes_no_slot(
    name: str,
    config: ModelConfig,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    build_adapter: AdapterBuilder,
) -> None:
    slots = Slots()
    table = AdapterTable(config, slots, max_loras=1, max_lora_rank=4)
    path = build_adapter("wrong", **settings)
    with pytest.raises(error) as raised:
        table.load(name, read_adapter(path))
    assert message in str(raised.value)
    assert (slots.changed, table.loaded) == ({}, ())
