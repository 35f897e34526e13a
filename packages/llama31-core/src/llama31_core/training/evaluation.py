"""Held-out data and sample prompts in; loss, perplexity and completions out. Weights are as training has them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np

from llama31_core.checkpoint import check_weights, open_weights
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig
from llama31_core.lora.adapter import read_adapter
from llama31_core.lora.table import adaptable_shapes, check_fits
from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import IGNORED_LABEL
from llama31_core.training.dataset import MindRecordDataset
from llama31_core.training.device import training_precision
from llama31_core.training.head import Objective
from llama31_core.training.lora import Lora, LoraTrainedLayers
from llama31_core.training.native_attention import attention_core
from llama31_core.training.report import perplexity
from llama31_core.training.weights import TrainedWeights


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy, mean over `num_label_tokens`, 0 of which give a loss of 0."""

    loss: float
    num_label_tokens: int
    elapsed_s: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def evaluate(
    backprop: Backprop,
    dataset: MindRecordDataset,
    batch_size: int,
    sum_number: Callable[[float], float] = float,
) -> HeldOut:
    """Every record of the data once; `sum_number` adds up over ranks that have different records."""
    started = time.perf_counter()
    total, count = 0.0, 0
    for batch in dataset.every_record(batch_size):
        total += backprop.loss(batch)
        count += int(np.count_nonzero(batch.labels != IGNORED_LABEL))
    count = round(sum_number(float(count)))
    loss = sum_number(total) / max(1, count)
    return HeldOut(loss, count, time.perf_counter() - started)


def load_for_evaluation(model_dir: Path, adapter_dir: Path | None = None) -> Backprop:
    """A model that is evaluated and not trained, with an adapter merged in if one is given.

    Raises:
        CheckpointError: missing, damaged or of another shape.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    config = ModelConfig.from_pretrained(model_dir)
    changes = {}
    if adapter_dir is not None:
        adapter = read_adapter(adapter_dir)
        check_fits(adapter, adaptable_shapes(config), adapter.rank)
        changes = dict(adapter.changes)
    nothing = LoraTrainedLayers(Lora((), rank=1, alpha=1.0))  # all frozen, so that there are no gradients to hold
    precision = training_precision()
    weights = TrainedWeights(config, attention_core(config, precision), nothing, precision=precision)
    with open_weights(model_dir) as reader:
        check_weights(reader, config)

        def read(name: str) -> Array:
            value: Array = reader.read(name)
            if name not in changes:
                return value
            change = changes[name]
            return np.asarray(value.astype(np.float32) + np.float32(change.scale) * (change.b @ change.a))

        weights.load(read)
    return Backprop(weights, Objective(), "none")
