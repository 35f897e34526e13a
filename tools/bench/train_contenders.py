"""The contenders of tools/bench/train.py: a model of random weights that takes a training step whenever it is told to.

Both do the same: AdamW over all weights in float32, decay on matrices, clipping by global norm, cross-entropy over all
tokens of the batch (or over the records' labels), no recomputation. transformers runs with `sdpa` attention.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama31_core.config import ModelConfig

SIZES = {
    "135M": {"vocab_size": 49152, "dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "ffn_dim": 1536},
    "25M": {"vocab_size": 16384, "dim": 384, "n_layers": 10, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 1280},
    # Two narrow layers under Llama 3's vocabulary: what the logits cost.
    "128k": {"vocab_size": 128256, "dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512},
}
_RATE, _DECAY, _MAX_NORM = 1e-4, 0.1, 1.0
# Gives loss and the number of labels that were trained on.
Step = Callable[[], tuple[float, int]]


def model_config(size: str) -> ModelConfig:
    """The architecture of a size, with the embedding tied to the output."""
    return ModelConfig.build(f"bench {size}", tie_word_embeddings=True, max_seq_len=8192, **SIZES[size])


def random_ids(config: ModelConfig, batch: int, tokens: int) -> Iterator[npt.NDArray[np.int32]]:
    """The same sequences (batch, tokens + 1) for every contender."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, config.vocab_size, (batch, tokens + 1)).astype(np.int32)


def build_ours(size: str, batch: int, tokens: int, data: str) -> Step:
    """llama31_core's training step; on the records of `data` if that is not empty."""
    import mindspore as ms

    from llama31_core.training.backprop import Backprop
    from llama31_core.training.batch import Batch
    from llama31_core.training.dataset import MindRecordDataset
    from llama31_core.training.head import Objective
    from llama31_core.training.native_attention import attention_core
    from llama31_core.training.optim import AdamW
    from llama31_core.training.step import TrainStep
    from llama31_core.training.weights import TrainedWeights

    ms.set_context(mode=ms.GRAPH_MODE)
    config, rng = model_config(size), np.random.default_rng(1)
    weights = TrainedWeights(config, attention_core(config))
    weights.load(lambda name: rng.normal(float(len(weights.shape(name)) == 1), 0.02, weights.shape(name)))
    adam = AdamW(weights, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=_DECAY)
    step = TrainStep(Backprop(weights, Objective(), "none"), adam, max_norm=_MAX_NORM)
    if data:
        dataset = MindRecordDataset(Path(data), config, seq_length=tokens, batch_size=batch, seed=0, num_workers=1)
        batches = dataset.batches()
    else:
        batches = (Batch.unpacked(ids[:, :-1].copy(), ids[:, 1:].copy()) for ids in random_ids(config, batch, tokens))

    def take() -> tuple[float, int]:
        result = step([next(batches)], _RATE)
        return result.loss, result.num_label_tokens

    return take


def build_torch(size: str, batch: int, tokens: int, data: str) -> Step:
    """transformers with torch's AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model_config(size)
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf(), attn_implementation="sdpa"))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95), eps=1e-8)
    stream = random_ids(config, batch, tokens)

    def take() -> tuple[float, int]:
        ids = torch.from_numpy(next(stream)).long()
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        adam.step()
        return loss.item(), batch * tokens

    return take


BUILDERS = {"llama31": build_ours, "torch": build_torch}


def timed(step: Step) -> dict[str, float]:
    """A step's figures."""
    started = time.perf_counter()
    loss, num_labels = step()
    assert math.isfinite(loss)
    return {"step_s": time.perf_counter() - started, "loss": loss, "labels": num_labels}
