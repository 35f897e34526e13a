"""Adapters in the engine: chosen by each request, never mixed up in the cache, loaded and unloaded as it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from mindspore import nn

from llama31_core.checkpoint import save_weights, spell
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError, RequestError
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.lora.adapter import PREFIX, read_adapter

CONFIG = ModelConfig(vocab_size=97, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=128)
OPTIONS = EngineOptions(num_blocks=64, block_size=4, max_batch_size=6, max_loras=2, max_lora_rank=4)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 97, 21)]
Weights = dict[str, npt.NDArray[np.float32]]
MODULES = {"q_proj": "attention.wq", "v_proj": "attention.wv", "up_proj": "feed_forward.w3"}


@pytest.fixture
def weights(random_weights: Callable[..., Weights]) -> Weights:
    return random_weights(CONFIG)


@pytest.fixture
def model_dir(weights: Weights, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", weights)


def save_model(path: Path, weights: Weights) -> Path:
    path.mkdir()
    CONFIG.save_pretrained(path)
    save_weights(path / "model.safetensors", weights.items())
    return path


@pytest.fixture
def adapters(weights: Weights, tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for seed, name in enumerate(("one", "two", "three")):
        rng = np.random.default_rng(seed)
        paths[name] = tmp_path / name
        paths[name].mkdir()
        values = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(MODULES)}
        (paths[name] / "adapter_config.json").write_text(json.dumps(values))
        stored = {}
        for layer in range(CONFIG.n_layers):
            for module in MODULES.values():
                weight = f"model.layers.{layer}.{module}.weight"
                rows, columns = weights[weight].shape
                prefix = PREFIX + spell(weight, "hf").removesuffix(".weight")
                stored[f"{prefix}.lora_A.weight"] = rng.normal(0, columns**-0.5, (4, columns)).astype(np.float32)
                stored[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.7, (rows, 4)).astype(np.float32)
        save_weights(paths[name] / "adapter_model.safetensors", stored.items())
    return paths


def completed(engine: Engine, requests: dict[str, str | None]) -> dict[str, list[int]]:
    """What each request of the same prompt gives with its adapter, all of them together."""
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    for name, adapter in requests.items():
        engine.add(name, PROMPT, GREEDY, adapter=adapter)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
    return tokens


def compiled_graphs(engine: Engine) -> set[str]:
    """The keys under which MindSpore keeps what it has compiled of the engine's network."""
    runner = engine._runner
    assert isinstance(runner, GraphRunner)
    assert isinstance(runner._net, nn.Cell)
    keys: set[str] = runner._net.compile_cache
    return keys


def test_requests_in_one_batch_give_what_merged_models_give(
    weights: Weights, model_dir: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    expected: dict[str | None, list[int]] = {
        None: Engine.from_pretrained(model_dir, OPTIONS).generate([PROMPT], GREEDY)[0].token_ids
    }
    for name, path in adapters.items():
        merged = dict(weights)
        for weight, change in read_adapter(path).changes.items():
            merged[weight] = weights[weight] + np.float32(change.scale) * (change.b @ change.a)
        own = Engine.from_pretrained(save_model(tmp_path / f"merged-{name}", merged), OPTIONS)
        expected[name] = own.generate([PROMPT], GREEDY)[0].token_ids
    assert len({tuple(tokens) for tokens in expected.values()}) == 4  # all differ, so that a mix-up shows

    engine = Engine.from_pretrained(model_dir, OPTIONS)
    for name in ("one", "two"):
        engine.load_adapter(name, adapters[name])
    # The prompt is in the cache five times over, once for each adapter and the base; equal ones share their blocks.
    got = completed(engine, {"a": "one", "b": None, "c": "two", "d": "one", "e": None})
    assert (got["a"], got["b"], got["c"]) == (expected["one"], expected[None], expected["two"])
    assert (got["d"], got["e"]) == (got["a"], got["b"])
    compiled = set(compiled_graphs(engine))
    assert compiled
    before = engine.stats().num_prefix_hit_tokens
    assert completed(engine, {"f": "two", "g": None}) == {"f": got["c"], "g": got["b"]}
    assert engine.stats().num_prefix_hit_tokens == before + 2 * 20

    with pytest.raises(ConfigError, match="all 2 slots are taken"):
        engine.load_adapter("three", adapters["three"])
    engine.unload_adapter("one")
    engine.load_adapter("three", adapters["three"])
    assert completed(engine, {"h": "three", "i": "two"}) == {"h": expected["three"], "i": expected["two"]}
    engine.unload_adapter("two")
    engine.load_adapter("two", adapters["one"])  # another adapter under a known name finds nothing of the old one
    assert engine.generate([PROMPT], GREEDY, adapter="two")[0].token_ids == expected["one"]
    assert [adapter.name for adapter in engine.adapters] == ["three", "two"]
    assert compiled_graphs(engine) == compiled


def test_errors_name_what_is_loaded(model_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    engine = Engine.from_pretrained(model_dir, OPTIONS)
    engine.load_adapter("one", adapters["one"])
    with pytest.raises(RequestError, match="adapter 'four' is not loaded; loaded are 'one'"):
        engine.add("a", PROMPT, GREEDY, adapter="four")
    engine.add("a", PROMPT, GREEDY, adapter="one")
    with pytest.raises(RequestError, match="'one' is used by a running request"):
        engine.unload_adapter("one")
    assert engine.abort("a")
    engine.unload_adapter("one")
    with pytest.raises(RequestError, match="'one' is not loaded; loaded are none"):
        engine.unload_adapter("one")
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.load_adapter("nothing", tmp_path / "nothing")
    without = Engine.from_pretrained(model_dir, EngineOptions(num_blocks=8, block_size=4))
    with pytest.raises(ConfigError, match=r"all 0 slots are taken .* raise max_loras"):
        without.load_adapter("one", adapters["one"])
