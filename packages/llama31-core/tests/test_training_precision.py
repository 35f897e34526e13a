"""Training as an Ascend NPU does it, as far as a CPU can see: every graph's types and shapes, in bfloat16.

An operator without a CPU kernel is inferred when a graph is compiled. The values of the same graphs in 16 bits, over
operators that a CPU has in float16, are the matter of test_training_step.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel import ring
from llama31_core.parallel.groups import Group
from llama31_core.parallel.sequence import ring_biases
from llama31_core.run_config import load_run_config
from llama31_core.training.attention import FusedAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.head import Objective
from llama31_core.training.ranks import Alone
from llama31_core.training.start import check_run
from llama31_core.training.weights import TrainedWeights

B, T = 2, 16
CONFIG = ModelConfig.preset("tiny")
E, H, K, D, F = CONFIG.dim, CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim, CONFIG.ffn_dim
HALF, FLOAT32 = ms.bfloat16, ms.float32


@pytest.fixture
def weights(run_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainedWeights:
    """What a run trains where MindSpore says that its device is an NPU; MindSpore itself goes on as on a CPU."""
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.chdir(tmp_path)  # a graph that cannot be inferred leaves a report in the working directory
    real = ms.get_context
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend" if key == "device_target" else real(key))
    return Alone().load_weights(load_run_config(run_file), CONFIG, None, None)


class Facts(nn.Cell):  # type: ignore[misc]
    """Shapes and types of what a cell gives, in pairs; they are constants of its graph, so no kernel runs.

    Args:
        nested: tensors in the tuple that is the second thing it gives; None if it gives one tensor.
    """

    def __init__(self, cell: nn.Cell, nested: int | None) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self._is_one, self._nested = nested is None, nested or 0

    def construct(self, *arguments: Tensor) -> Any:
        out = self.cell(*arguments)
        if self._is_one:
            return out.shape, out.dtype
        facts: tuple[Any, ...] = (out[0].shape, out[0].dtype)
        for i in range(self._nested):
            facts += (out[1][i].shape, out[1][i].dtype)
        return facts


class HeadFacts(Facts):
    """The same of two tensors."""

    def construct(self, *arguments: Tensor) -> Any:
        total, d_x_NE = self.cell(*arguments)
        return total.shape, total.dtype, d_x_NE.shape, d_x_NE.dtype


def of(*shape: int, dtype: Any = HALF) -> Tensor:
    return Tensor(np.ones(shape), dtype)


def test_products_are_bfloat16_and_weights_and_gradients_float32(weights: TrainedWeights) -> None:
    assert isinstance(weights.block.attention.core, FusedAttention)
    assert not weights.has_native_rows
    assert {tensor.dtype for tensor in weights.tensors.values()} == {FLOAT32}
    backprop = Backprop(weights, Objective(), "none")
    tokens = of(B, T, dtype=ms.int32)
    assert Facts(backprop._embed, None)(tokens) == ((B, T, E), HALF)

    kept = [(B, T, H, D), (B, T, K, D), (B, T, K, D), (B, T, H * D), (B, T, E), (B, T, F), (B, T, F)]
    x, angles = of(B, T, E), of(B, T, 1, D, dtype=FLOAT32)
    place = (tokens, angles, angles)
    facts = Facts(backprop._forward, len(kept))(x, *place, tokens)
    assert facts == sum(((shape, HALF) for shape in [(B, T, E), *kept]), ())

    trained = backprop._backward.trained
    facts = Facts(backprop._backward, len(trained))(x, x, *place, *(of(*shape) for shape in kept), tokens)
    shapes = ((tuple(parameter.shape), FLOAT32) for parameter in trained)
    assert facts == sum(shapes, ((B, T, E), HALF))
    assert len(trained) == 9

    labels = of(8, dtype=ms.int32)
    sums = of(B * T, E, dtype=FLOAT32)
    facts = HeadFacts(backprop._head, None)(of(B * T, E), sums, labels, labels, Tensor(1.0, FLOAT32))
    assert facts == ((), FLOAT32, (B * T, E), FLOAT32)
    assert {buffer.dtype for buffer in backprop._buffers.values()} == {FLOAT32}
    facts = Facts(backprop._embedding_gradient, None)(tokens, x)
    assert facts == ((CONFIG.vocab_size, E), FLOAT32)


def test_ring_attention_in_float16_is_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose neighbour sends what it was sent: the numbers mean nothing, and are the same in both types."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    still = SimpleNamespace(shift=lambda group, distance: lambda x: x)
    monkeypatch.setattr(ring, "transport", lambda: still)
    attention = ring.RingAttention(Group((0, 1), 0, "pair"))
    biases = [Tensor(bias) for bias in ring_biases(np.zeros((B, 2 * T), np.int32), 0, 2)]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(B, T, heads, D)).astype(np.float32) for heads in (H, K, K, H)]
    results = []
    for dtype in (ms.float32, ms.float16):
        q, k, v, d_out = (Tensor(array, dtype) for array in arrays)
        out = attention(q, k, v, of(B, T, dtype=ms.int32), *biases)
        gradients = attention.gradients(q, k, v, out, d_out.reshape(B, T, -1), of(B, T, dtype=ms.int32), *biases)
        assert {tensor.dtype for tensor in (out, *gradients)} == {dtype}
        results.append([tensor.astype(ms.float32).asnumpy() for tensor in (out, *gradients)])
    for exact, half in zip(*results, strict=True):
        np.testing.assert_allclose(half, exact, atol=5e-3 * np.abs(exact).max())


def test_float32_products_are_refused_at_the_start(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run_config(run_file, ["model.model_config.compute_dtype=float32"])
    check_run(run, "run.yaml", 1)
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend")
    with pytest.raises(ConfigError, match="compute_dtype is 'float32'"):
        check_run(run, "run.yaml", 1)
