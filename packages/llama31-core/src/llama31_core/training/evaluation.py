"""Held-out data and sample prompts in; loss, perplexity and completions out. Weights are as training has them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import IGNORED_LABEL
from llama31_core.training.dataset import MindRecordDataset


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy, mean over `num_label_tokens`, 0 of which give a loss of 0."""

    loss: float
    num_label_tokens: int
    elapsed_s: float


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
