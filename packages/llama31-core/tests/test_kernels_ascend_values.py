"""The Ascend kernels over operators that do what their documentation says, against the portable kernels.

The operators have no CPU kernel, so each is written here in NumPy from its documentation: layouts, which mask value
hides, where the scale goes, how lengths are counted. That the hardware agrees with its documentation is not tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Parameter, Tensor

from llama31_core import kernels
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.kernels import ascend, portable
from llama31_core.model import CausalAttention, Llama, PagedAttention

Array = npt.NDArray[np.float32]


def attention(q: Array, k: Array, v: Array, scale: float, added: Array) -> Array:
    """One sequence: q (T, H, D), k and v (S, K, D), `added` to the scores (T, S)."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) * scale + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).astype(np.float32)
    return out


class RmsNorm:
    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        value = x.asnumpy()
        rstd = 1 / np.sqrt((value**2).mean(-1, keepdims=True) + self.epsilon)
        return Tensor(value * rstd * gamma.asnumpy()), Tensor(rstd)


def swiglu(both: Tensor, dim: int) -> Tensor:
    first, second = np.split(both.asnumpy(), 2, axis=dim)
    return Tensor(first / (1 + np.exp(-first)) * second)


def rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    assert mode == 0  # rotate_half
    value = x.asnumpy()
    first, second = np.split(value, 2, axis=-1)
    return Tensor(value * cos.asnumpy() + np.concatenate([-second, first], -1) * sin.asnumpy())


class FlashAttentionScore:
    def __init__(
        self, head_num: int, keep_prob: float, scale: float, pre: int, following: int, _: int, layout: str, mode: int
    ) -> None:
        assert (keep_prob, layout, mode) == (1.0, "BSND", 0)
        self.head_num, self.scale, self.pre, self.following = head_num, scale, pre, following

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[None, None, None, Tensor]:
        real_shift, drop_mask, padding_mask, mask, prefix, q_lens, kv_lens = rest
        assert (real_shift, drop_mask, padding_mask, prefix, q_lens, kv_lens) == (None,) * 6
        batch, tokens, heads, _ = q.shape
        assert heads == self.head_num
        assert mask.shape == (batch, 1, tokens, tokens)
        assert mask.dtype == ms.uint8
        row, column = np.mgrid[:tokens, :tokens]
        outside = (column > row + self.following) | (column < row - self.pre)
        added = np.where((mask.asnumpy()[:, 0] == 1) | outside, -np.inf, 0.0)
        rows = zip(q.asnumpy(), k.asnumpy(), v.asnumpy(), added, strict=True)
        return None, None, None, Tensor(np.stack([attention(*row[:3], self.scale, row[3]) for row in rows]))


def reshape_and_cache(k: Tensor, v: Tensor, k_cache: Parameter, v_cache: Parameter, slots: Tensor) -> Tensor:
    for values, cache in ((k, k_cache), (v, v_cache)):
        content = cache.asnumpy().copy()
        _, block_size, heads, width = content.shape
        for slot, value in zip(slots.asnumpy(), values.asnumpy(), strict=True):
            content[slot // block_size, slot % block_size] = value.reshape(heads, width)
        cache.set_data(Tensor(content))
    return k


class PagedAttentionOperator:
    def __init__(self, head_num: int, scale_value: float, kv_head_num: int) -> None:
        self.head_num, self.scale, self.kv_head_num = head_num, scale_value, kv_head_num

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Tensor:
        tables, context_lens, antiquant_scale, antiquant_offset, mask, q_lens, alibi = rest
        assert (antiquant_scale, antiquant_offset, alibi) == (None,) * 3
        assert k_cache.shape[2] == self.kv_head_num
        width = k_cache.shape[3]
        outputs, start = [], 0
        for table, length, count in zip(tables.asnumpy(), context_lens.asnumpy(), q_lens.asnumpy(), strict=True):
            k, v = (
                cache.asnumpy()[table].reshape(-1, self.kv_head_num, width)[:length] for cache in (k_cache, v_cache)
            )
            queries = q.asnumpy()[start : start + count].reshape(count, self.head_num, width)
            outputs.append(attention(queries, k, v, self.scale, mask.asnumpy()[start : start + count, :length]))
            start += count
        assert start == q.shape[0]
        return Tensor(np.concatenate(outputs).reshape(q.shape))


@pytest.fixture(autouse=True)
def _documented_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, operator in {
        "RmsNorm": RmsNorm,
        "_swiglu": swiglu,
        "_rotate": rotary_position_embedding,
        "FlashAttentionScore": FlashAttentionScore,
        "_reshape_and_cache": reshape_and_cache,
        "PagedAttention": PagedAttentionOperator,
    }.items():
        assert hasattr(ascend, name)
        monkeypatch.setattr(ascend, name, operator)
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Tensor:
        return Tensor(rng.normal(size=shape).astype(np.float32))

    return normal


def assert_equal(one: Tensor, other: Tensor) -> None:
    np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=1e-5)


def test_pointwise_kernels(draw: Callable[..., Tensor]) -> None:
    x, weight = draw(2, 5, 64), draw(64)
    assert_equal(ascend.rms_norm(x, weight, 1e-5), portable.rms_norm(x, weight, 1e-5))
    assert_equal(ascend.swiglu(x, x + 1), portable.swiglu(x, x + 1))
    heads, cos, sin = draw(2, 5, 4, 16), draw(2, 5, 1, 16), draw(2, 5, 1, 16)
    assert_equal(ascend.apply_rope(heads, cos, sin), portable.apply_rope(heads, cos, sin))


def test_causal_attention_of_packed_sequences(draw: Callable[..., Tensor]) -> None:
    q, k, v = draw(2, 9, 4, 16), draw(2, 9, 2, 16), draw(2, 9, 2, 16)
    segments = Tensor(np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9], np.int32))
    assert_equal(ascend.causal_attention(q, k, v, segments), portable.causal_attention(q, k, v, segments))


CONFIG = ModelConfig(
    vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, rope_scaling=RopeScaling(factor=4.0)
)


def with_weights(model: Llama, weights: dict[str, Array]) -> Llama:
    for name, parameter in model.parameters_and_names():
        if name in weights:
            parameter.set_data(Tensor(weights[name]))
    return model


def test_a_model_in_training_equals_the_portable_one(random_weights: Callable[..., dict[str, Array]]) -> None:
    weights = random_weights(CONFIG)
    rng = np.random.default_rng(1)
    tokens = Tensor(rng.integers(0, 96, (2, 12)).astype(np.int32))
    positions = Tensor(np.tile(np.arange(12, dtype=np.int32), (2, 1)))
    logits = []
    for name in ("portable", "ascend"):
        with kernels.use(name):
            model = with_weights(Llama(CONFIG, CausalAttention), weights)
        logits.append(model(tokens, positions, Tensor(np.zeros((2, 12), np.int32))))
    np.testing.assert_allclose(logits[0].asnumpy(), logits[1].asnumpy(), atol=1e-4)


def test_chunks_and_decoding_over_the_cache_equal_the_portable_ones(
    random_weights: Callable[..., dict[str, Array]],
) -> None:
    weights = random_weights(CONFIG)
    rng = np.random.default_rng(2)
    tables = np.array([[5, 2, 7], [1, 6, 3]], np.int32)  # blocks of 4
    models = []
    for name in ("portable", "ascend"):
        with kernels.use(name):
            models.append(with_weights(Llama(CONFIG, lambda: PagedAttention(CONFIG, 8, 4)), weights))
    for starts, count in (([0, 0], 5), ([5, 5], 4), ([9, 9], 1)):
        tokens = rng.integers(0, 96, (2, count)).astype(np.int32)
        positions = np.array(starts, np.int32)[:, None] + np.arange(count, dtype=np.int32)
        slots = np.take_along_axis(tables, positions // 4, 1) * 4 + positions % 4
        inputs = [Tensor(array.astype(np.int32)) for array in (tokens, positions, slots, tables)]
        one, other = (model(*inputs).asnumpy() for model in models)
        np.testing.assert_allclose(one, other, atol=1e-4)
