"""What a plan counts: weights and cache in the types that they will have, against the memory that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

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
from llama31_core.inference.cache_dtype import KvCacheDtype
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


@pytest.mark.usefixtures("native_kernels")
def test_weights_in_sixteen_bits_are_counted_and_kept_so(save: Save) -> None:
    path = save("bf16")
    plan = Engine.plan(path, OPTIONS)
    assert plan.precision == Precision("bfloat16", "float32", "bfloat16")
    assert plan.cache.weight_bytes == 2 * CONFIG.num_parameters
    assert plan.cache.block_bytes == 2 * BLOCK
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


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_what_a_plan_counts_is_what_both_caches_take(
    stored: str, asked: Any, kernels: str, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = save(stored), EngineOptions(num_blocks=8, num_host_blocks=3, kv_cache_dtype=asked)
    if kernels == "portable":
        monkeypatch.setenv("LLAMA31_NATIVE_KERNELS", "0")
    elif what_is_missing() is not None:
        pytest.skip("no native kernels on this machine")
    if (kernels, asked) == ("portable", "bfloat16"):
        with pytest.raises(ConfigError, match=r"'bfloat16', allowed with the portable kernels .* 'auto' and 'float32'"):
            Engine.plan(path, options)
        return
    plan = Engine.plan(path, options)
    is_small = asked == "bfloat16" or (kernels, asked, stored) == ("native", "auto", "bf16")
    assert plan.precision.cache_dtype == ("bfloat16" if is_small else "float32")
    assert plan.cache.block_bytes == (2 if is_small else 4) * BLOCK
    runner = GraphRunner.from_pretrained(path, CONFIG, plan.cache, plan.options, plan.precision)
    cached = [parameter for name, parameter in runner.llama.parameters_and_names() if name.endswith("_cache")]
    assert sum(cache.nbytes for cache in cached) == 8 * plan.cache.block_bytes
    assert runner._blocks._host.nbytes == 3 * plan.cache.block_bytes


@pytest.mark.usefixtures("native_kernels")
def test_the_same_memory_holds_twice_the_tokens(save: Save) -> None:
    path = save("bf16")
    sizes = [
        Engine.plan(path, EngineOptions(cache_memory_bytes=40 * BLOCK, kv_cache_dtype=dtype)).cache.num_blocks
        for dtype in get_args(KvCacheDtype)
    ]
    assert sizes == [20, 10, 20]


@pytest.mark.parametrize("how", ["several ranks", "adapters"])
def test_the_portable_kernels_of_ranks_and_adapters_keep_float32(how: str, save: Save) -> None:
    path, num_ranks, max_loras = save("bf16"), 1 + (how == "several ranks"), int(how == "adapters")
    options = EngineOptions(num_blocks=8, max_loras=max_loras)
    plan = EnginePlan.for_weights(CONFIG, options, path, num_ranks=num_ranks)
    assert plan.cache.block_bytes == 4 * BLOCK
    asked = replace(options, kv_cache_dtype="bfloat16")
    with pytest.raises(ConfigError, match=rf"write no bfloat16 there \({how} run on these alone"):
        EnginePlan.for_weights(CONFIG, asked, path, num_ranks=num_ranks)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_kernels_that_could_not_be_compiled_leave_float32_and_no_other_wish(
    asked: Any, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save("bf16")
    plan = Engine.plan(path, replace(OPTIONS, kv_cache_dtype=asked))
    monkeypatch.setattr("llama31_core.inference.runner.native_kernels_here", lambda: False)
    sizes = (CONFIG, plan.cache, plan.options, plan.precision)
    if asked == "bfloat16":
        with pytest.raises(ConfigError, match="could not be compiled"):
            GraphRunner.from_pretrained(path, *sizes)
    else:
        runner = GraphRunner.from_pretrained(path, *sizes)
        assert runner.llama.model.layers[0].attention.core.k_cache.dtype == ms.float32


@pytest.mark.usefixtures("native_kernels")
def test_kernels_that_could_not_be_compiled_take_no_more_memory(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("bf16")
    plan = Engine.plan(path, EngineOptions(cache_memory_bytes=40 * BLOCK))
    assert plan.cache.num_blocks == 20
    monkeypatch.setattr("llama31_core.inference.runner.native_kernels_here", lambda: False)
    runner = GraphRunner.from_pretrained(path, CONFIG, plan.cache, plan.options, plan.precision)
    assert (runner.num_blocks, plan.cache.block_bytes) == (10, 2 * BLOCK)
    cached = [parameter for name, parameter in runner.llama.parameters_and_names() if name.endswith("_cache")]
    assert sum(cache.nbytes for cache in cached) == 40 * BLOCK


def test_another_type_of_the_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8', allowed are 'auto', 'float32', 'bfloat16'"):
        EngineOptions(kv_cache_dtype="fp8")  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_ascend")
def test_an_npu_keeps_keys_and_values_in_the_type_of_products(save: Save) -> None:
    path = save("bf16")
    assert Engine.plan(path, replace(OPTIONS, kv_cache_dtype="bfloat16")).cache.block_bytes == 2 * BLOCK
    with pytest.raises(ConfigError, match="'float32', allowed with products in bfloat16 on Ascend is 'auto'"):
        Engine.plan(path, replace(OPTIONS, kv_cache_dtype="float32"))


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
    sizes = "29.92 GiB of weights in float32, 1.00 GiB of float32 cache (num_blocks=256)"
    assert f"needs 30.92 GiB: {sizes}" in str(error.value)
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
