"""Training steps against transformers and torch's AdamW on the same data in the same order."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
import torch
from mindspore import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig
from llama31_core.model import CausalAttention, Llama
from llama31_core.training.optim import AdamW
from llama31_core.training.schedule import learning_rate
from llama31_core.training.step import NextTokenLoss, TrainStep

STEPS, PEAK, DECAY, MAX_NORM = 20, 3e-3, 0.1, 1.0
# Adam divides a gradient by its own size, so where a gradient is nothing but rounding error its sign decides a whole
# step. An epsilon above that error keeps such elements out of the comparison.
EPS = 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_equal_transformers_and_torch(
    tied: bool, random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]]
) -> None:
    config = ModelConfig.preset("tiny").model_copy(update={"tie_word_embeddings": tied})
    weights = random_weights(config)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, config.vocab_size, (STEPS, 2, 40)).astype(np.int32)
    labels = np.where(rng.random((STEPS, 2, 40)) < 0.4, -100, rng.integers(0, config.vocab_size, (STEPS, 2, 40)))

    model = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    model.load_state_dict({spell(n, "hf"): torch.from_numpy(w) for n, w in weights.items()}, strict=not tied)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch_adam = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=EPS)
    scheduler = get_cosine_schedule_with_warmup(torch_adam, 4, STEPS)

    ms.set_context(mode=ms.GRAPH_MODE)
    llama = Llama(config, CausalAttention)
    for name, parameter in llama.parameters_and_names():
        parameter.set_data(Tensor(weights[name].copy()))
    optimizer = AdamW(llama.trainable_params(), beta1=0.9, beta2=0.95, eps=EPS, weight_decay=DECAY, max_norm=MAX_NORM)
    step = TrainStep(NextTokenLoss(llama), optimizer)

    for i in range(STEPS):
        logits = model(torch.from_numpy(tokens[i]).long()).logits
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels[i]).long().flatten())
        torch_adam.zero_grad()
        want.backward()
        want_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        rate = learning_rate(i, schedule="CosineWithWarmUpLR", peak=PEAK, end=0.0, warmup_steps=4, total_steps=STEPS)
        assert rate == pytest.approx(scheduler.get_last_lr()[0])
        torch_adam.step()
        scheduler.step()

        loss, norm = step(Tensor(tokens[i]), Tensor(labels[i].astype(np.int32)), *optimizer.scalars(i, rate))
        assert float(loss) == pytest.approx(want.item(), rel=1e-5)
        assert float(norm) == pytest.approx(want_norm.item(), rel=1e-4)

    state = model.state_dict()
    for name, parameter in llama.parameters_and_names():
        np.testing.assert_allclose(parameter.asnumpy(), state[spell(name, "hf")].numpy(), atol=1e-4, err_msg=name)
