"""Where a process stands among those of a run, and what it builds there. Alone it is the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llama31_core.config import ModelConfig
from llama31_core.run_config import RunConfig
from llama31_core.training.backprop import Backprop
from llama31_core.training.block import Recompute
from llama31_core.training.device import training_precision
from llama31_core.training.head import Objective
from llama31_core.training.lora import Lora, LoraTrainedLayers
from llama31_core.training.native_attention import attention_core
from llama31_core.training.optim import AdamW
from llama31_core.training.reduction import OneProcess, Reduction
from llama31_core.training.start import load_values
from llama31_core.training.weights import TrainedWeights

Arrays = Mapping[str, npt.NDArray[np.float32]]
Slices = tuple[slice, ...]


class Ranks(Protocol):
    """The ranks of a run. All of them call these alike, in the same order.

    Attributes:
        data_rank, num_data_ranks: this rank's place among those that have different data.
        replica_size: ranks that work on the same data.
        is_first: whether this rank writes what the run leaves behind.
    """

    data_rank: int
    num_data_ranks: int
    replica_size: int
    is_first: bool
    reduction: Reduction

    def load_weights(
        self, run: RunConfig, config: ModelConfig, lora: Lora | None, resumed: Path | None
    ) -> TrainedWeights:
        """What this rank trains, from the model or from the checkpoint that the run goes on from."""

    def build_backprop(self, weights: TrainedWeights, objective: Objective, recompute: Recompute) -> Backprop:
        """Loss and gradients."""

    def build_optimizer(self, weights: TrainedWeights, run: RunConfig) -> AdamW:
        """AdamW of loaded weights."""

    def collect(self, weights: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """Whole weights, or what has their names and shapes, on the first rank; nothing on the others."""

    def collect_moments(self, moments: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """The same for the optimiser's state."""

    def slices(self, name: str) -> Slices:
        """What this rank has of a weight, or of a moment."""

    def agree(self, facts: Mapping[str, str], problem: str = "") -> None:
        """See that all ranks can begin, and with the same facts; else all raise the same ConfigError."""

    def any(self, flag: bool) -> bool:
        """Whether some rank says so; none goes on before all have said."""


class Alone:
    """A run of one process."""

    data_rank, num_data_ranks, replica_size, is_first = 0, 1, 1, True

    def __init__(self) -> None:
        self.reduction: Reduction = OneProcess()

    def load_weights(
        self, run: RunConfig, config: ModelConfig, lora: Lora | None, resumed: Path | None
    ) -> TrainedWeights:
        layers = None if lora is None else LoraTrainedLayers(lora)
        precision = training_precision(run.model_section.compute_dtype)
        weights = TrainedWeights(config, attention_core(config, precision), layers, precision=precision)
        load_values(weights, Path(run.load_checkpoint), lora, resumed, run.seed)
        return weights

    def build_backprop(self, weights: TrainedWeights, objective: Objective, recompute: Recompute) -> Backprop:
        return Backprop(weights, objective, recompute)

    def build_optimizer(self, weights: TrainedWeights, run: RunConfig) -> AdamW:
        (beta1, beta2), optimizer = run.optimizer.moments, run.optimizer
        return AdamW(weights, beta1=beta1, beta2=beta2, eps=optimizer.eps, weight_decay=optimizer.weight_decay)

    def collect(self, weights: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        return dict(weights)

    def collect_moments(self, moments: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        return dict(moments)

    def slices(self, name: str) -> Slices:
        return ()

    def agree(self, facts: Mapping[str, str], problem: str = "") -> None:
        pass

    def any(self, flag: bool) -> bool:
        return flag
