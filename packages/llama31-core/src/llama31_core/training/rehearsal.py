"""Takes steps of a model of constant weights and prints the most memory it had: what `plan` is checked against.

python -m llama31_core.training.rehearsal '{"config": {…}, "seq_length": 512, "batch_size": 1, "micro_batches": 1,
    "recompute": "none"}'
"""

from __future__ import annotations

import json
import sys

import mindspore as ms
import numpy as np

from llama31_core.config import ModelConfig
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import Batch
from llama31_core.training.block import Recompute
from llama31_core.training.head import Objective
from llama31_core.training.optim import AdamW
from llama31_core.training.process_memory import file_bytes, peak_bytes
from llama31_core.training.step import TrainStep
from llama31_core.training.weights import TrainedWeights


def rehearse(
    config: ModelConfig, seq_length: int, batch_size: int, micro_batches: int, recompute: Recompute, num_steps: int = 3
) -> int:
    """Peak memory of this process in bytes after some steps on random tokens, without the pages of files.

    Those are libraries: the kernel can take them back, and maps from 200 to 400 MB of them ahead of use, as it likes.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    weights = TrainedWeights(config, BlockwiseAttention)
    weights.load(lambda name: np.full(weights.shape(name), 0.01, np.float32))
    optimizer = AdamW(weights, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    step = TrainStep(Backprop(weights, Objective(), recompute), optimizer, max_norm=1.0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, seq_length)).astype(np.int32)
    for _ in range(num_steps):
        step([Batch.unpacked(tokens, tokens)] * micro_batches, 1e-5)
    return peak_bytes() - file_bytes()


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    print(rehearse(ModelConfig(**values.pop("config")), **values))
