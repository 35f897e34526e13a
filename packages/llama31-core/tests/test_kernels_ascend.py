"""Every operator of the Ascend kernels, as far as a machine without an NPU can check it: types and shapes.

An operator without a CPU kernel is still inferred when a graph is compiled, and only then found to have no kernel. So
a call that fails at "Kernel select" had arguments that the operator takes. What inference does not look at (the meaning
of masks, layouts, scales, and for some operators shapes) is the matter of test_kernels_ascend_values.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from llama31_core import kernels
from llama31_core.config import ModelConfig
from llama31_core.kernels import ascend, portable
from llama31_core.model import CausalAttention, Llama, PagedAttention
from llama31_core.model.layers import Layers

B, T, H, K, D, P, M, BLOCKS = 2, 8, 4, 2, 64, 16, 3, 10
# In bfloat16 a CPU has no kernel for as much as a reshape, so there the first failure need not name the fused operator.
INFERRED = "Kernel select failed"
HALF = {"float16": ms.float16, "bfloat16": ms.bfloat16}
INT = ms.int32


@pytest.fixture(autouse=True)
def _graph_mode(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.chdir(tmp_path)  # a graph that cannot be inferred leaves a report in the working directory


def of(*shape: int, dtype: Any = ms.float32) -> Tensor:
    return Tensor(np.ones(shape), dtype)


class Inferred(nn.Cell):  # type: ignore[misc]
    """Shape and type of what a function gives; they are constants of the graph, so no kernel runs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def construct(self, *arguments: Tensor) -> Any:
        out = self.function(*arguments)
        return out.shape, out.dtype


class Run(Inferred):
    def construct(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


class WriteCache(nn.Cell):  # type: ignore[misc]
    """Caches are parameters, which only a cell can hold."""

    def __init__(self, kernel_set: kernels.KernelSet, dtype: Any) -> None:
        super().__init__()
        shape = kernel_set.cache_shape(BLOCKS, P, K, D)
        self.k_cache = Parameter(of(*shape, dtype=dtype))
        self.v_cache = Parameter(of(*shape, dtype=dtype))
        self.write = kernel_set.write_cache

    def construct(self, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.write(self.k_cache, self.v_cache, slots, k, v)


def rms_norm(kernel_set: kernels.KernelSet) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return kernel_set.rms_norm(x, weight, 1e-5)

    return function


def paged(kernel_set: kernels.KernelSet) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, positions: Tensor) -> Tensor:
        return kernel_set.paged_attention(q, k, v, tables, positions, P)

    return function


def calls(
    kernel_set: kernels.KernelSet, dtype: Any, tokens: int = T
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """A right call of every kernel that gives a tensor: the operator it must reach, the function, its arguments."""
    x, angles = of(B, tokens, H, D, dtype=dtype), of(B, tokens, 1, D)
    kv = of(B, tokens, K, D, dtype=dtype)
    cache = of(*kernel_set.cache_shape(BLOCKS, P, K, D), dtype=dtype)
    integers = of(B, tokens, dtype=INT)
    return {
        "RmsNorm": (rms_norm(kernel_set), [of(B, tokens, 96, dtype=dtype), of(96)]),
        "Swiglu": (kernel_set.swiglu, [of(B, tokens, 96, dtype=dtype)] * 2),
        "RotaryPositionEmbedding": (kernel_set.apply_rope, [x, angles, angles]),
        "FlashAttentionScore": (kernel_set.causal_attention, [x, kv, kv, integers]),
        "PagedAttention": (paged(kernel_set), [x, cache, cache, of(B, M, dtype=INT), integers]),
    }


@pytest.mark.parametrize("tokens", [1, T], ids=["decode", "chunk"])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF.keys())
@pytest.mark.parametrize("operator", calls(ascend, ms.float16))
def test_inference_passes_and_gives_what_the_portable_kernel_gives(operator: str, dtype: Any, tokens: int) -> None:
    function, arguments = calls(ascend, dtype, tokens)[operator]
    oracle, its_arguments = calls(portable, dtype, tokens)[operator]
    assert Inferred(function)(*arguments) == Inferred(oracle)(*its_arguments)
    with pytest.raises((RuntimeError, TypeError), match=INFERRED) as error:
        Run(function)(*arguments)
    assert dtype == ms.bfloat16 or f"Unsupported op [{operator}] on CPU" in str(error.value)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF.keys())
def test_reshape_and_cache_is_inferred(dtype: Any) -> None:
    kv = of(B, T, K, D, dtype=dtype)
    with pytest.raises((RuntimeError, TypeError), match=INFERRED) as error:
        WriteCache(ascend, dtype)(of(B, T, dtype=INT), kv, kv)
    assert dtype == ms.bfloat16 or "Unsupported op [ReshapeAndCache] on CPU" in str(error.value)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF.keys())
def test_gradients_of_what_training_uses_are_inferred(dtype: Any) -> None:
    for operator in ("RmsNorm", "Swiglu", "RotaryPositionEmbedding", "FlashAttentionScore"):
        function, arguments = calls(ascend, dtype)[operator]
        gradient = ms.grad(Run(function), grad_position=0)
        with pytest.raises((RuntimeError, TypeError), match=INFERRED):
            gradient(*arguments)


def wrong(change: dict[int, Tensor], operator: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, arguments = calls(ascend, ms.float16)[operator]
    return function, [change.get(index, argument) for index, argument in enumerate(arguments)]


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("RmsNorm", {1: of(95)}, "gamma"),
        ("Swiglu", {0: of(B, T, 95, dtype=ms.float16)}, "Swiglu"),
        ("FlashAttentionScore", {1: of(B, T, 3, D, dtype=ms.float16)}, "head"),
        ("PagedAttention", {3: of(B, M)}, "block_tables"),
        ("PagedAttention", {1: of(BLOCKS, P, K, D, dtype=INT)}, "key_cache"),
    ],
)
def test_wrong_arguments_fail_in_another_way(operator: str, change: dict[int, Tensor], message: str) -> None:
    function, arguments = wrong(change, operator)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as error:
        Run(function)(*arguments)
    assert INFERRED not in str(error.value)


@pytest.mark.parametrize(("slots", "message"), [(of(B, T), "slot_mapping"), (of(B, T - 1, dtype=INT), "num_tokens")])
def test_wrong_slots_fail_in_another_way(slots: Tensor, message: str) -> None:
    kv = of(B, T, K, D, dtype=ms.float16)
    with pytest.raises((RuntimeError, TypeError), match=message) as error:
        WriteCache(ascend, ms.float16)(slots, kv, kv)
    assert INFERRED not in str(error.value)


CONFIG = ModelConfig(vocab_size=128, dim=H * D, n_layers=2, n_heads=H, n_kv_heads=K, ffn_dim=512)


def shape_and_dtype(model: Llama, *context: Tensor) -> Any:
    ids = of(B, T, dtype=INT)
    return Inferred(model)(ids, ids, *context)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF.keys())
def test_a_whole_model_is_inferred(dtype: Any) -> None:
    ids, tables = of(B, T, dtype=INT), of(B, M, dtype=INT)
    with kernels.use("ascend"):
        trained = Llama(CONFIG, CausalAttention, Layers(dtype), dtype)
        served = Llama(CONFIG, lambda: PagedAttention(CONFIG, BLOCKS, P, dtype), Layers(dtype), dtype)
    assert shape_and_dtype(trained, ids) == ((B, T, CONFIG.vocab_size), ms.float32)
    any_shape = Tensor(shape=[None, None], dtype=INT)
    served.set_inputs(any_shape, any_shape, any_shape, any_shape)
    with pytest.raises((RuntimeError, TypeError), match=INFERRED):
        served(ids, ids, ids, tables)
