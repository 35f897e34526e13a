"""What a plan counts: weights and cache in the types that they will have, against the memory that there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest

from llama31_core import kernels
from llama31_core.checkpoint import open_weights, save_weights
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.inference import engine_plan
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.cache_plan import plan_cache
from llama31_core.inference.engine import Engine
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.native_support import what_is_missing
from llama31_core.precision import Precision

GIB = 1 << 30
CONFIG = ModelConfig(vocab_size=512, dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=192, max_seq_len=512)
OPTIONS = EngineOptions(num_blocks=8)
BLOCK = 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim * 16  # numbers of one block
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]]) -> Save:
    def build(dtype: str, config: ModelConfig = CONFIG) -> Path:
        path = tmp_path / dtype
        path.mkdir()
        config.save_pretrained(path)
        save_weights(path, random_weights(config).items(), dtype=dtype)
        return path

    return build


@pytest.fixture
def on_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plan, "device_target", lambda: "Ascend")


@pytest.mark.skipif(what_is_missing() is not None, reason="the native kernels do not run here")
def test_weights_in_sixteen_bits_are_counted_and_kept_so(save: Save) -> None:
    path = save("bf16")
    plan = Engine.plan(path, OPTIONS)
    assert plan.precision == Precision("bfloat16", "float32")
    assert plan.cache.weight_bytes == 2 * CONFIG.num_parameters
    assert plan.cache.block_bytes == 4 * BLOCK
    engine = Engine.from_plan(plan, path)
    assert len(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    runner = GraphRunner.from_pretrained(path, CONFIG, plan.cache, plan.options, plan.precision)
    with open_weights(path) as stored:
        for name, parameter in runner.llama.parameters_and_names():
            if "_cache" not in name:
                assert parameter.dtype == (ms.float32 if "norm" in name else ms.bfloat16)
                values = stored.read(name).astype(np.float32)
                np.testing.assert_array_equal(parameter.astype(ms.float32).asnumpy(), values)


@pytest.mark.parametrize("why", ["float32 stored", "float16 stored", "adapters", "portable kernels"])
def test_everything_else_is_float32_on_a_cpu(why: str, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"float32 stored": "fp32", "float16 stored": "fp16"}.get(why, "bf16"))
    options = EngineOptions(num_blocks=8, max_loras=int(why == "adapters"), max_lora_rank=4)
    if why == "portable kernels":
        monkeypatch.setenv("LLAMA31_NATIVE_KERNELS", "0")
    plan = Engine.plan(path, options)
    assert plan.precision == Precision()
    assert plan.cache.weight_bytes >= 4 * CONFIG.num_parameters


@pytest.mark.usefixtures("on_ascend")
def test_an_npu_has_what_the_run_file_asks_for(save: Save) -> None:
    path = save("fp32")
    assert Engine.plan(path, OPTIONS).precision == Precision("bfloat16", "bfloat16")
    plan = EnginePlan.for_weights(CONFIG, OPTIONS, path, Precision("float32", "float16"))
    assert (plan.cache.weight_bytes, plan.cache.block_bytes) == (4 * CONFIG.num_parameters, 2 * BLOCK)


@pytest.mark.usefixtures("on_ascend")
@pytest.mark.parametrize("asked", [Precision("bfloat16", "bfloat16"), Precision("float16", "float16")])
def test_the_model_for_an_npu_is_built_and_its_calls_are_inferred(asked: Precision, save: Save) -> None:
    path = save("bf16")
    plan = EnginePlan.for_weights(CONFIG, OPTIONS, path, asked)
    with kernels.use("ascend"):
        runner = GraphRunner.from_pretrained(path, CONFIG, plan.cache, plan.options, plan.precision)
    types = {name: parameter.dtype for name, parameter in runner.llama.parameters_and_names()}
    wanted = {True: ms.float32, False: getattr(ms, asked.param)}
    assert all(dtype == wanted["norm" in name] for name, dtype in types.items() if "_cache" not in name)
    assert {dtype for name, dtype in types.items() if "_cache" in name} == {getattr(ms, asked.compute)}
    batch = ForwardInput([[1, 2, 3], [4]], [0, 0], [[0], [1]], [1, 1])
    # What a CPU says of operators that it lacks, once types and shapes of the whole graph have been found right.
    with pytest.raises((RuntimeError, TypeError), match="Kernel select failed"):
        runner.forward(batch)


def test_a_budget_counts_what_is_there_and_names_the_knob() -> None:
    config = ModelConfig.preset("llama3.1-8b")
    half = plan_cache(config, EngineOptions(), precision=Precision("bfloat16", "float32"), available_bytes=17 * GIB)
    assert half.weight_bytes == 2 * 8_030_261_248
    assert half.total_bytes <= 17 * GIB
    with pytest.raises(ConfigError) as error:
        plan_cache(config, EngineOptions(), available_bytes=17 * GIB)
    assert "needs 30.92 GiB: 29.92 GiB of weights in float32, 1.00 GiB of cache (num_blocks=256)" in str(error.value)
    assert "17.00 GiB are free; lower cache_memory_bytes, num_blocks" in str(error.value)


def test_the_head_of_the_checkpoint_is_checked_first(save: Save) -> None:
    path = save("fp32")
    CONFIG.model_copy(update={"n_layers": 3}).save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"9 missing \(model.layers.2.attention.wq.weight"):
        Engine.plan(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        Engine.plan(path)


def test_options_and_single_sizes_are_not_mixed(save: Save) -> None:
    with pytest.raises(ConfigError, match="options and num_blocks, block_size are given; put num_blocks, block_size"):
        Engine.from_pretrained(save("fp32"), OPTIONS, num_blocks=4, block_size=8)


def test_a_draft_model_is_counted_beside_the_model(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(num_blocks=8, num_speculative_tokens=2)
    path = save("fp32")
    plan = Engine.plan(path, options)
    monkeypatch.setattr(engine_plan, "available_memory_bytes", lambda: 2 * plan.cache.total_bytes)
    assert plan.for_draft(path).cache.total_bytes == plan.cache.total_bytes
    monkeypatch.setattr(engine_plan, "available_memory_bytes", lambda: 2 * plan.cache.total_bytes - 1)
    with pytest.raises(ConfigError, match=r"model and draft model need .* lower num_blocks or cache_memory_bytes"):
        plan.for_draft(path)
