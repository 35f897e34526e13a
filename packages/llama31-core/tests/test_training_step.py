"""Training steps against transformers and torch's AdamW on the same data in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig
from llama31_core.precision import Precision
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import Batch
from llama31_core.training.block import Recompute
from llama31_core.training.head import Objective
from llama31_core.training.loss_scale import LossScale
from llama31_core.training.optim import AdamW
from llama31_core.training.schedule import learning_rate
from llama31_core.training.step import TrainStep
from llama31_core.training.weights import TrainedWeights

Weights = dict[str, npt.NDArray[np.float32]]
STEPS, PEAK, DECAY, MAX_NORM = 20, 3e-3, 0.1, 1.0
# Adam divides a gradient by its own size, so where a gradient is nothing but rounding error its sign decides a whole
# step. An epsilon above that error keeps such elements out of the comparison.
EPS = 1e-6
FLOAT32, FLOAT16 = Precision(), Precision("float32", "float16")


@pytest.fixture(autouse=True)
def graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)


def trained(config: ModelConfig, weights: Mapping[str, npt.NDArray[np.float32]]) -> TrainedWeights:
    result = TrainedWeights(config, BlockwiseAttention)
    result.load(weights.__getitem__)
    return result


@dataclass
class Compiled:
    """What is compiled once for the tests of this file: a tiny model, its gradients and AdamW."""

    weights: TrainedWeights
    backprop: Backprop
    optimizer: AdamW

    def restart(self, values: Weights) -> None:
        """As if it were new, with these weights."""
        self.weights.load(values.__getitem__)
        shapes = ((name, tensor.shape) for name, tensor in self.optimizer.moments.items())
        self.optimizer.load({name: np.zeros(shape, np.float32) for name, shape in shapes}, 0)


def compile_tiny(config: ModelConfig, precision: Precision = FLOAT32) -> Compiled:
    weights = TrainedWeights(config, BlockwiseAttention, precision=precision)
    weights.load(lambda name: np.zeros(weights.shape(name), np.float32))
    optimizer = AdamW(weights, beta1=0.9, beta2=0.95, eps=EPS, weight_decay=DECAY)
    return Compiled(weights, Backprop(weights, Objective(), "none"), optimizer)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    ms.set_context(mode=ms.GRAPH_MODE)
    return compile_tiny(ModelConfig.preset("tiny"))


def reference(config: ModelConfig, weights: Weights) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    state = {spell(n, "hf"): torch.from_numpy(w.copy()) for n, w in weights.items()}
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return model


def random_batch(seed: int, batch: int = 2, tokens: int = 40, vocab: int = 512) -> Batch:
    """Uneven numbers of labels, so that a mean of means is not the mean."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (batch, tokens)).astype(np.int32)
    masked = rng.random((batch, tokens)) < rng.uniform(0.1, 0.9)
    labels = np.where(masked, -100, rng.integers(0, vocab, (batch, tokens))).astype(np.int32)
    return Batch.unpacked(ids, labels)


def torch_loss(model: LlamaForCausalLM, batch: Batch, smoothing: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """Summed over labels."""
    logits = model(
        torch.from_numpy(batch.tokens).long(), position_ids=torch.from_numpy(batch.positions.copy()).long()
    ).logits
    labels = torch.from_numpy(batch.labels).long().flatten()
    logits = logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return loss + z * (logits.logsumexp(-1)[labels >= 0] ** 2).sum()


@pytest.mark.parametrize(("tied", "accumulated"), [(False, 1), (True, 3)])
def test_twenty_steps_equal_transformers_and_torch(
    tied: bool, accumulated: int, random_weights: Callable[..., Weights], compiled: Compiled
) -> None:
    config = ModelConfig.preset("tiny").model_copy(update={"tie_word_embeddings": tied})
    weights = random_weights(config)
    model = reference(config, weights)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch_adam = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=EPS)
    scheduler = get_cosine_schedule_with_warmup(torch_adam, 4, STEPS)

    if tied:
        compiled = compile_tiny(config)
    compiled.restart(weights)
    step = TrainStep(compiled.backprop, compiled.optimizer, max_norm=MAX_NORM)

    for i in range(STEPS):
        batches = [random_batch(accumulated * i + k) for k in range(accumulated)]
        count = sum(int((batch.labels >= 0).sum()) for batch in batches)
        torch_adam.zero_grad()
        want = 0.0
        for batch in batches:
            loss = torch_loss(model, batch) / count
            loss.backward()
            want += loss.item()
        want_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        rate = learning_rate(i, schedule="CosineWithWarmUpLR", peak=PEAK, end=0.0, warmup_steps=4, total_steps=STEPS)
        assert rate == pytest.approx(scheduler.get_last_lr()[0])
        torch_adam.step()
        scheduler.step()

        result = step(batches, rate)
        assert result.num_label_tokens == count
        assert result.loss == pytest.approx(want, rel=1e-5)
        assert result.grad_norm == pytest.approx(want_norm.item(), rel=1e-4)

    state = model.state_dict()
    for name, value in compiled.weights.arrays():
        np.testing.assert_allclose(value, state[spell(name, "hf")].numpy(), atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.01)])
def test_label_smoothing_and_z_loss_equal_torchs(
    smoothing: float, z_loss: float, random_weights: Callable[..., Weights]
) -> None:
    config = ModelConfig.preset("tiny")
    weights = random_weights(config)
    model, batch = reference(config, weights), random_batch(3)
    loss = torch_loss(model, batch, smoothing, z_loss)
    loss.backward()
    backprop = Backprop(trained(config, weights), Objective(smoothing, z_loss), "none")
    assert backprop.accumulate([batch], 1.0) == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(backprop, model)


def check_gradients(backprop: Backprop, model: LlamaForCausalLM) -> None:
    want = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for name, gradient in backprop.gradients.items():
        expected = want[spell(name, "hf")]
        np.testing.assert_allclose(
            gradient.asnumpy(), expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4, err_msg=name
        )
    assert len(backprop.gradients) == len(want)


@pytest.mark.parametrize("recompute", ["select", "full"])
def test_gradients_over_several_blocks_of_queries(recompute: Recompute, random_weights: Callable[..., Weights]) -> None:
    """300 tokens are three blocks of queries and more than one chunk of labels; nothing changes with recomputation."""
    config = ModelConfig.preset("tiny")
    weights = random_weights(config)
    model, batch = reference(config, weights), random_batch(4, batch=3, tokens=300)
    loss = torch_loss(model, batch)
    loss.backward()
    backprop = Backprop(trained(config, weights), Objective(), recompute)
    assert backprop.accumulate([batch], 1.0) == pytest.approx(loss.item(), rel=1e-5)
    assert backprop.loss(batch) == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(backprop, model)


@pytest.mark.parametrize("lengths", [[150, 60, 90]])
def test_packed_documents_train_as_if_each_stood_alone(
    lengths: list[int], random_weights: Callable[..., Weights], compiled: Compiled
) -> None:
    config = ModelConfig.preset("tiny")
    weights = random_weights(config)
    model = reference(config, weights)
    documents = [random_batch(10 + i, batch=1, tokens=length) for i, length in enumerate(lengths)]
    for document in documents:
        torch_loss(model, document).backward()
    want = sum(torch_loss(model, document).item() for document in documents)

    padding = 5
    join = [np.concatenate([getattr(d, key)[0] for d in documents]) for key in ("tokens", "labels", "positions")]
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    tokens, positions, segment_ids = (
        np.pad(x, (0, padding))[None].astype(np.int32) for x in (join[0], join[2], segments)
    )
    labels = np.pad(join[1], (0, padding), constant_values=-100)[None].astype(np.int32)
    packed = Batch(tokens, labels, positions, segment_ids)
    compiled.restart(weights)
    backprop = compiled.backprop
    backprop.clear()
    assert backprop.accumulate([packed], 1.0) == pytest.approx(want, rel=1e-5)
    check_gradients(backprop, model)

    one_document = Batch.unpacked(tokens, labels)  # what would be wrong: documents that see each other
    assert abs(backprop.loss(one_document) / want - 1) > 1e-3


def test_an_overflow_changes_nothing_and_lowers_the_scale(
    random_weights: Callable[..., Weights], compiled: Compiled
) -> None:
    weights, optimizer = random_weights(ModelConfig.preset("tiny")), compiled.optimizer
    compiled.restart(weights)
    scale = LossScale(value=3e38, factor=1e3, window=2)
    step = TrainStep(compiled.backprop, optimizer, max_norm=1.0, loss_scale=scale)
    result = step([random_batch(1)], 1e-3)
    assert result.is_overflow
    assert np.isfinite(result.loss)
    assert optimizer.num_updates == 0
    assert scale.value == pytest.approx(3e35)
    for name, value in compiled.weights.arrays():
        np.testing.assert_array_equal(value, weights[name])
    scale.value, scale.factor = 1024.0, 2.0
    assert not step([random_batch(1)], 1e-3).is_overflow
    assert not step([random_batch(1)], 1e-3).is_overflow
    assert scale.value == 2048.0
    assert optimizer.num_updates == 2


def test_products_in_float16_train_weights_in_float32(
    random_weights: Callable[..., Weights], compiled: Compiled
) -> None:
    """A scale that overflows float16 is lowered until it does not; then losses are near those of float32 products."""
    weights = random_weights(ModelConfig.preset("tiny"))
    half = compile_tiny(ModelConfig.preset("tiny"), FLOAT16)
    half.restart(weights)
    step = TrainStep(half.backprop, half.optimizer, max_norm=1.0, loss_scale=LossScale(2.0**24, factor=16.0))
    results = [step([random_batch(i)], 1e-3) for i in range(8)]
    taken = [i for i, result in enumerate(results) if not result.is_overflow]
    assert 4 <= len(taken) < 8
    assert taken[0] > 0
    assert half.optimizer.num_updates == len(taken)
    assert {gradient.dtype for gradient in half.backprop.gradients.values()} == {ms.float32}

    compiled.restart(weights)
    exact = TrainStep(compiled.backprop, compiled.optimizer, max_norm=1.0)
    for i in taken:
        want = exact([random_batch(i)], 1e-3)
        # float16 has 11 bits; an error of 5e-4 a product, over some ten of them in a row.
        assert results[i].loss == pytest.approx(want.loss, rel=2e-3)
        assert results[i].grad_norm == pytest.approx(want.grad_norm, rel=1e-2)
    for name, value in half.weights.arrays():
        assert value.dtype == np.float32
        assert (value != value.astype(np.float16)).mean() > 0.5, name


def test_a_scaled_loss_gives_the_same_step(random_weights: Callable[..., Weights], compiled: Compiled) -> None:
    results = []
    for value in (1.0, 4096.0):
        compiled.restart(random_weights(ModelConfig.preset("tiny")))
        step = TrainStep(compiled.backprop, compiled.optimizer, max_norm=0.1, loss_scale=LossScale(value))
        step([random_batch(1)], 1e-3)
        results.append({name: array.copy() for name, array in compiled.weights.arrays()})
    for name, array in results[0].items():
        np.testing.assert_allclose(results[1][name], array, atol=1e-6, err_msg=name)


def test_a_step_without_labels_changes_nothing(random_weights: Callable[..., Weights], compiled: Compiled) -> None:
    compiled.restart(random_weights(ModelConfig.preset("tiny")))
    step = TrainStep(compiled.backprop, compiled.optimizer, max_norm=1.0)
    batch = random_batch(1)
    result = step([Batch.unpacked(batch.tokens, np.full_like(batch.labels, -100))], 1e-3)
    assert (result.loss, result.num_label_tokens, compiled.optimizer.num_updates) == (0.0, 0, 0)
