"""The native attention of training against MindSpore's operators: values, gradients, and nothing of other documents."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor, nn

from llama31_core.config import ModelConfig
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import Batch
from llama31_core.training.head import Objective
from llama31_core.training.native_attention import NativeAttention, attention_core, document_starts
from llama31_core.training.weights import TrainedWeights

needs_native = pytest.mark.usefixtures("native_kernels")
Arrays = list[npt.NDArray[np.float32]]


class _Both(nn.Cell):  # type: ignore[misc]
    """Output and gradients in one graph."""

    def __init__(self, core: nn.Cell) -> None:
        super().__init__()
        self.core = core

    def construct(self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, positions: Tensor, *context: Tensor) -> object:
        out = self.core(q, k, v, positions, *context)
        return out, self.core.gradients(q, k, v, out, d_out, positions, *context)


def results(core: nn.Cell, inputs: Arrays, segments: npt.NDArray[np.int32]) -> Arrays:
    ms.set_context(mode=ms.GRAPH_MODE)
    context = [Tensor(array) for array in core.context(segments)]
    out, gradients = _Both(core)(*map(Tensor, inputs), Tensor(segments), *context)
    return [tensor.asnumpy() for tensor in (out, *gradients)]


def random_inputs(batch: int, tokens: int, heads: int, kv_heads: int, width: int) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, width), (heads * width,)]
    return [rng.normal(0, 1, (batch, tokens, *shape)).astype(np.float32) for shape in shapes]


@needs_native
@pytest.mark.parametrize(
    ("sizes", "documents"),
    [((2, 5, 2, 1, 16), 1), ((1, 200, 3, 3, 48), 4), ((2, 130, 4, 2, 80), 9), ((1, 64, 6, 2, 128), 1)],
)
def test_values_and_gradients_equal_mindspores(sizes: tuple[int, int, int, int, int], documents: int) -> None:
    """Tokens, widths and documents that fill tiles, and that do not."""
    inputs = random_inputs(*sizes)
    segments = np.sort(np.random.default_rng(1).integers(0, documents, sizes[:2]), -1).astype(np.int32)
    ours = results(NativeAttention(), inputs, segments)
    for got, want in zip(ours, results(BlockwiseAttention(), inputs, segments), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@needs_native
def test_what_another_document_holds_changes_nothing() -> None:
    inputs = random_inputs(1, 100, 2, 1, 32)
    segments = np.repeat([[3, 7]], 50, axis=1).astype(np.int32)
    before = results(NativeAttention(), inputs, segments)
    for array in inputs:
        array[:, 50:] *= 7
    for got, want in zip(results(NativeAttention(), inputs, segments), before, strict=True):
        np.testing.assert_array_equal(got[:, :50], want[:, :50])


def test_a_document_is_a_run_of_equal_ids() -> None:
    segments = np.array([[0, 0, 1, 1, 0, 0], [5, 5, 5, 5, 5, 5]], np.int32)
    np.testing.assert_array_equal(document_starts(segments), [[0, 0, 2, 2, 4, 4], [0] * 6])


@needs_native
def test_a_model_trains_the_same_with_either(
    random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]],
) -> None:
    config = ModelConfig.preset("tiny")
    assert attention_core(config) is NativeAttention
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 70)).astype(np.int32)
    batch = Batch.unpacked(ids, ids)
    gradients, losses = [], []
    for core in (NativeAttention, BlockwiseAttention):
        weights = TrainedWeights(config, core)
        weights.load(random_weights(config).__getitem__)
        backprop = Backprop(weights, Objective(), "full")
        losses.append(backprop.accumulate([batch], 1.0))
        gradients.append({name: tensor.asnumpy() for name, tensor in backprop.gradients.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, want in gradients[1].items():
        np.testing.assert_allclose(gradients[0][name], want, atol=1e-5 * np.abs(want).max(), err_msg=name)


@needs_native
def test_rows_by_the_kernels_train_as_by_mindspores_operators(
    random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, rotations, SwiGLU and cross-entropy, of widths and a vocabulary that fill no vectors."""
    sizes = {"dim": 72, "head_dim": 18, "ffn_dim": 90, "vocab_size": 517}
    config = ModelConfig(**ModelConfig.preset("tiny").model_dump() | sizes)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 70)).astype(np.int32)
    labels = np.where(ids % 3 == 0, np.int32(-100), ids)
    gradients, losses = [], []
    for has_native in (True, False):
        monkeypatch.setattr("llama31_core.training.weights.native_kernels_here", lambda *, warns, has=has_native: has)
        weights = TrainedWeights(config, BlockwiseAttention)
        assert weights.has_native_rows is has_native
        weights.load(random_weights(config).__getitem__)
        backprop = Backprop(weights, Objective(), "none")
        losses.append(backprop.accumulate([Batch.unpacked(ids, labels)], 1.0))
        gradients.append({name: tensor.asnumpy() for name, tensor in backprop.gradients.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, want in gradients[1].items():
        np.testing.assert_allclose(gradients[0][name], want, atol=1e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("change", [{"head_dim": 8}, {}])
def test_the_portable_attention_serves_where_the_kernels_cannot(
    change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not change:
        monkeypatch.setattr("llama31_core.training.native_attention.native_kernels_here", lambda: False)
    config = ModelConfig.preset("tiny").model_copy(update=change)
    assert attention_core(config) is BlockwiseAttention
