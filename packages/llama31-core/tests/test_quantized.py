"""Weights of few bits: what rounding may change and what it may not, and models over them on every kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from llama31_core import kernels
from llama31_core.checkpoint import check_weights, open_weights, parameter_shapes, save_weights
from llama31_core.checkpoint.names import NORM_OUT
from llama31_core.checkpoint.quantized import (
    DequantizedWeights,
    bits_of,
    check_stored,
    pack,
    part_name,
    quantize,
    stored_bytes,
    unpack,
)
from llama31_core.config import ModelConfig, Quantization
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.cache_plan import plan_cache
from llama31_core.inference.engine import Engine
from llama31_core.inference.native_llama import pack_ranges
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.values import set_value
from llama31_core.kernels import ascend, portable
from llama31_core.model import Llama, PagedAttention
from llama31_core.model.quantized import QuantizedLayers, QuantizedLinear
from llama31_core.native_support import instruction_options
from llama31_core.parallel import ParallelConfig
from llama31_core.precision import Precision

Weights = dict[str, npt.NDArray[Any]]
OPTIONS = EngineOptions(num_blocks=16, block_size=8)


def config_of(bits: Literal[8, 4], tied: bool = False) -> ModelConfig:
    """Widths that are no multiple of the group: the last group of a row is shorter."""
    return ModelConfig(
        vocab_size=50, dim=96, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, ffn_dim=160, max_seq_len=64,
        tie_word_embeddings=tied, quantization=Quantization(bits=bits, group_size=64),
    )  # fmt: skip


def quantized(config: ModelConfig, weights: Weights) -> Weights:
    assert config.quantization is not None
    tensors: Weights = {}
    for name, array in weights.items():
        if array.ndim == 1:
            tensors[name] = array
            continue
        matrix = quantize(array, bits_of(name, config.quantization), config.quantization.group_size)
        tensors |= {part_name(name, part): values for part, values in matrix.parts().items()}
    return tensors


def save(path: Path, config: ModelConfig, tensors: Weights) -> Path:
    path.mkdir()
    config.save_pretrained(path)
    save_weights(path, tensors.items())
    return path


def runner_of(path: Path) -> GraphRunner:
    config = ModelConfig.from_pretrained(path)
    plan = plan_cache(config, OPTIONS)
    return GraphRunner.from_pretrained(path, config, plan, OPTIONS, Precision("bfloat16", "float32"))


def prefill(runner: GraphRunner, prompts: list[list[int]]) -> npt.NDArray[np.float32]:
    tables = [[4 * index, 4 * index + 1, 4 * index + 2, 4 * index + 3] for index in range(len(prompts))]
    lengths = [len(prompt) for prompt in prompts]
    return runner.forward(ForwardInput(prompts, [0] * len(prompts), tables, lengths))


def _multiplies_bfloat16() -> bool:
    options = instruction_options()
    return options is not None and "-mavx512bf16" in options


def _kernel_error() -> float:
    """Of what numbers are rounded to before a product: 8 bits of bfloat16, or 16 of the largest of a section."""
    return 0.02 if _multiplies_bfloat16() else 2e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.sampled_from([32, 64, 96, 160]), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_within_half_a_step_and_zeros_stay_where_offsets_are_whole(
    bits: int, rows: int, columns: int, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.normal(rng.normal(), 1, (rows, columns)) * 10 ** rng.uniform(-4, 3)).astype(np.float32)
    weights[:, :: rng.integers(2, 9)] = 0
    matrix = quantize(weights, bits, group)
    back = matrix.dequantize()
    steps = matrix.scales[:, np.arange(columns) // group]
    assert (np.abs(back - weights) <= 0.5001 * steps + 1e-6 * np.abs(weights)).all()
    offsets = matrix.biases / matrix.scales
    is_whole = offsets == np.rint(offsets)
    assert (back[(weights == 0) & is_whole[:, np.arange(columns) // group]] == 0).all()
    assert is_whole.all() or bits == 4
    # What 16 bits of an NPU hold, exactly or nearly: numbers of 4 bits are given to it less 8.
    assert (matrix.scales == matrix.scales.astype(ml_dtypes.bfloat16)).all()
    held = offsets + (8 if bits == 4 else 0)
    assert np.abs(held - held.astype(ml_dtypes.bfloat16)).max() <= (1 / 32 if bits == 4 else 0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 15), st.floats(-30, 3), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("bits", [8, 4])
def test_ranges_in_32_bits_are_the_same(bits: int, first: float, magnitude: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, 16, (6, 64)) - first
    weights = (np.concatenate([grid, rng.normal(0, 5, (6, 64))]) * 10**magnitude).astype(np.float32)
    matrix = quantize(weights, bits, 32)
    packed, num_rounded = pack_ranges(matrix.scales, matrix.biases)
    assert num_rounded == 0
    scales = (packed << 16).view(np.float32)
    assert (scales == matrix.scales).all()
    assert ((packed >> 16) * (scales / np.float32(128)) == matrix.biases).all()


def test_biases_between_128ths_are_rounded_and_counted() -> None:
    packed, num_rounded = pack_ranges(np.full((1, 3), 2, np.float32), np.array([[1, -1.001, 0.5]], np.float32))
    assert (packed >> 16).tolist() == [[64, -64, 32]]
    assert num_rounded == 1


@pytest.mark.parametrize(
    ("scale", "bias"), [(1.001, 0.0), (1.0, 256.0), (1.0, np.nan), (0.0, 0.0), (np.inf, 1.0), (np.nan, 1.0)]
)
def test_ranges_that_do_not_fit_in_32_bits_are_refused(scale: float, bias: float) -> None:
    with pytest.raises(CheckpointError, match="make them again"):
        pack_ranges(np.full((1, 2), scale, np.float32), np.full((1, 2), bias, np.float32))


def test_weights_whose_squares_are_no_numbers_of_32_bits() -> None:
    weights = np.linspace(-1e25, 1e25, 64, dtype=np.float32).reshape(2, 32)
    with np.errstate(over="ignore"):
        matrix = quantize(weights, 4, 32)
    assert (np.abs(matrix.dequantize() - weights) <= 0.51 * matrix.scales).all()


def test_a_grid_that_begins_anywhere_is_found_with_4_bits() -> None:
    """What Q4_1 files hold: 16 steps from the least weight on, which is no whole number of them."""
    rng = np.random.default_rng(0)
    numbers, scales = rng.integers(0, 16, (64, 32)), rng.uniform(0.01, 0.02, (64, 1))
    numbers[:, 0], numbers[:, 1] = 0, 15
    weights = (numbers * scales - 7.4 * scales).astype(np.float32)
    matrix = quantize(weights, 4, 32)
    assert np.abs(matrix.dequantize() - weights).max() < 0.13 * scales.max()  # a scale has 8 bits; half a step is 0.5


@given(st.integers(0, 2**32 - 1))
def test_packed_numbers_come_back(seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 16, (3, 32)).astype(np.uint8)
    assert (unpack(pack(numbers)) == numbers).all()
    assert pack(numbers)[0, 0] == numbers[0, 0] + 16 * numbers[0, 1]


def test_a_group_of_one_value() -> None:
    weights = np.array([[2.5] * 32, [0.0] * 32, [-1.0] * 32], np.float32)
    np.testing.assert_allclose(quantize(weights, 4, 32).dequantize(), weights, rtol=0.01)  # a scale has 8 bits


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_models_on_both_cpu_kernels(
    tmp_path: Path, random_weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch, bits: Any, tied: bool
) -> None:
    """Native kernels that multiply bfloat16 give the bits of a checkpoint of these weights in it, all others nearly."""
    config = config_of(bits, tied)
    weights = random_weights(config)
    path = save(tmp_path / "few", config, quantized(config, weights))
    plain = config.model_copy(update={"quantization": None})
    with open_weights(path) as opened:
        widened = DequantizedWeights(opened, config)
        as_bf16 = {
            name: widened.read_slice(name, ()).astype(ml_dtypes.bfloat16 if len(shape) == 2 else np.float32)
            for name, shape in parameter_shapes(config).items()
        }
    twin = runner_of(save(tmp_path / "bf16", plain, as_bf16))
    runner = runner_of(path)
    assert Engine.plan(tmp_path / "few").precision.cache_dtype == "bfloat16"  # what follows has float32
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 50, shape).tolist() for shape in ((1, 1), (1, 7), (4, 25))]
    found = [prefill(runner, batch) for batch in batches]
    rounding = 0.0 if _multiplies_bfloat16() else 0.02  # the twin's weights are rounded
    for batch, logits in zip(batches, found, strict=True):
        assert np.abs(logits - prefill(twin, batch)).max() <= rounding * np.abs(logits).max()
    # 100 rows go through widened weights, 1 row through those in registers: the same bits.
    alone = [prefill(runner, [prompt[:1]])[0] for prompt in batches[-1]]
    np.testing.assert_array_equal(np.stack(alone), found[-1].reshape(4, 25, -1)[:, 0])
    monkeypatch.setattr("llama31_core.inference.runner.native_kernels_here", lambda: False)
    portable_runner = runner_of(path)
    for batch, logits in zip(batches, found, strict=True):
        slow = prefill(portable_runner, batch)
        assert np.abs(slow - logits).max() < _kernel_error() * np.abs(slow).max()


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("group_size", [32, 128, 2080])
@pytest.mark.parametrize("bits", [8, 4])
def test_long_rows_and_groups_on_both_cpu_kernels(
    tmp_path: Path, random_weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch, bits: Any, group_size: int
) -> None:
    """2,080 columns of 100 rows are cut into parts, of 25 rows not: the same bits. A group may be a whole row."""
    quantization = Quantization(bits=bits, group_size=group_size)
    config = config_of(bits).model_copy(update={"ffn_dim": 2080, "quantization": quantization})
    path = save(tmp_path / "few", config, quantized(config, random_weights(config)))
    runner = runner_of(path)
    prompts = np.random.default_rng(0).integers(0, 50, (4, 25)).tolist()
    together = prefill(runner, prompts).reshape(4, 25, -1)
    np.testing.assert_array_equal(np.stack([prefill(runner, [prompt]) for prompt in prompts]), together)
    np.testing.assert_array_equal(prefill(runner, [prompts[0][:1]])[0], together[0, 0])
    monkeypatch.setattr("llama31_core.inference.runner.native_kernels_here", lambda: False)
    expected = prefill(runner_of(path), prompts).reshape(together.shape)
    assert np.abs(together - expected).max() < _kernel_error() * np.abs(expected).max()


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_none(tmp_path: Path, random_weights: Callable[..., Weights], value: float) -> None:
    config = config_of(4)
    weights = random_weights(config)
    weights[NORM_OUT][3] = value
    runner = runner_of(save(tmp_path / "few", config, quantized(config, weights)))
    assert not np.isfinite(prefill(runner, [[1, 2, 3]])).any()


def test_a_part_of_the_rows_reads_as_that_part(tmp_path: Path, random_weights: Callable[..., Weights]) -> None:
    config = config_of(4)
    path = save(tmp_path / "few", config, quantized(config, random_weights(config)))
    with open_weights(path) as opened:
        weights = DequantizedWeights(opened, config)
        name = "model.layers.1.feed_forward.w2.weight"
        whole = weights.read_slice(name, ())
        assert whole.shape == weights.shape(name)
        np.testing.assert_array_equal(weights.read_slice(name, (slice(5, 9), slice(3, 7))), whole[5:9, 3:7])


def test_what_does_not_fit_is_refused(tmp_path: Path, random_weights: Callable[..., Weights]) -> None:
    config = config_of(8)
    tensors = quantized(config, random_weights(config))
    with open_weights(save(tmp_path / "good", config, tensors)) as good:
        check_stored(good, config)
        with pytest.raises(CheckpointError, match=r"quantised to 8 bits, which predict, chat and serve take"):
            check_weights(good, config)
        with pytest.raises(CheckpointError, match=r"misshapen \(model.layers.0.attention.wq.qweight is \(96, 96\)"):
            check_stored(good, config_of(4))
    assert stored_bytes(config) == sum(array.nbytes for array in tensors.values())
    wrong = {**tensors, "lm_head.scales": tensors["lm_head.scales"].astype(np.float16)}
    with (
        open_weights(save(tmp_path / "wrong", config, wrong)) as opened,
        pytest.raises(CheckpointError, match=r"lm_head.scales is float16, expected float32"),
    ):
        check_stored(opened, config)
    with pytest.raises(ConfigError, match=r"tp=2 is 2 ranks, a model of 8 bits runs in 1"):
        ParallelConfig(tp=2).check(config)
    with pytest.raises(ConfigError, match=r"max_loras is 2, allowed with a quantised model is 0"):
        plan_cache(config, EngineOptions(max_loras=2))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quant_method is 'gptq', allowed is 'llama31'"),
        ({"quant_method": "llama31", "bits": 3}, r"bits"),
        ({"quant_method": "llama31", "bits": 8, "group_size": 40}, r"multiple of 32, got 40"),
        ("int8", r"quant_method is 'int8'"),
    ],
)
def test_a_config_of_another_quantisation_is_refused(tmp_path: Path, found: Any, message: str) -> None:
    path = config_of(8).save_pretrained(tmp_path)
    assert ModelConfig.from_pretrained(tmp_path) == config_of(8)
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": found}))
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"dim=48 is not a multiple of 32"):
        ModelConfig.build("x", **{**config_of(8).model_dump(), "dim": 48})


class DocumentedMatmul:
    """WeightQuantBatchMatmul as CANN documents it (aclnnWeightQuantBatchMatmulV2): x @ ((w + offset) * scale)^T."""

    def __init__(self, transpose_x: bool, transpose_weight: bool, group_size: int) -> None:
        assert (transpose_x, transpose_weight) == (False, True)
        self.group_size = group_size

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, *rest: None) -> Tensor:
        assert rest == (None, None, None)
        numbers = weight.asnumpy().astype(np.int32)
        if numbers.shape[1] * 2 == x.shape[1]:  # two signed numbers of 4 bits, the lower half first
            halves = np.stack((numbers & 15, (numbers >> 4) & 15), axis=-1).reshape(len(numbers), -1)
            numbers = (halves ^ 8) - 8
        groups = np.arange(numbers.shape[1]) // self.group_size
        whole = (numbers + offset.asnumpy()[:, groups]) * scale.asnumpy()[:, groups]
        return Tensor((x.asnumpy() @ whole.T).astype(np.float32))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_ascend_kernel_over_its_documented_operator(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(ascend, "WeightQuantBatchMatmul", DocumentedMatmul)
    rng = np.random.default_rng(0)
    matrix = quantize(rng.normal(size=(12, 160)).astype(np.float32), bits, 64)
    x = rng.normal(size=(2, 3, 160)).astype(np.float32)
    # What `set_value` stores for an NPU; MindSpore gives no NumPy array of qint4x2.
    stored = (matrix.qweight ^ np.uint8(0x88)).view(np.int8) if bits == 4 else matrix.qweight
    ms.set_context(mode=ms.PYNATIVE_MODE)
    rest = (Tensor(matrix.scales), Tensor(matrix.biases), bits, 64)
    found = ascend.quantized_linear(Tensor(x), Tensor(stored), *rest)
    expected = portable.quantized_linear(Tensor(x), Tensor(matrix.qweight), *rest)
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), atol=1e-4)
    np.testing.assert_allclose(expected.asnumpy(), x @ matrix.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_ascend_operator_takes_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Types and shapes are inferred on any machine; then there is no kernel for a CPU (test_kernels_ascend.py)."""
    monkeypatch.chdir(tmp_path)
    ms.set_context(mode=ms.GRAPH_MODE)
    with kernels.use("ascend"):
        layer = QuantizedLinear(64, 160, bits, 64)
    matrix = quantize(np.ones((64, 160), np.float32), bits, 64)
    for parameter, values in zip((layer.qweight, layer.scales, layer.biases), matrix.parts().values(), strict=True):
        set_value(parameter, values)
    with pytest.raises((RuntimeError, TypeError), match=r"Unsupported op \[WeightQuantBatchMatmul\] on CPU"):
        layer(Tensor(np.ones((2, 3, 160)), ms.float16))
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"WeightQuantBatchMatmul.*should be same"):
        layer(Tensor(np.ones((2, 3, 128)), ms.float16))


def test_a_whole_ascend_model_has_its_layers(tmp_path: Path) -> None:
    config = config_of(4)
    assert config.quantization is not None
    with kernels.use("ascend"):
        llama = Llama(
            config,
            lambda: PagedAttention(config, 4, 16),
            QuantizedLayers(config.quantization),
            compute_dtype=ms.float16,
        )
    assert llama.model.layers[0].attention.wq.qweight.dtype == ms.qint4x2
    assert llama.lm_head is not None
    assert llama.lm_head.qweight.dtype == ms.int8
