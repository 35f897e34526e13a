"""The sections of a run file that say how to train: duration, optimiser, learning rate, data, clipping, checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama31_core.run_config.section import Section
from llama31_core.training.schedule import ScheduleType

RecomputePolicy = Literal["none", "select", "full"]


class RunnerConfig(Section):
    """How long to train and on how much at once."""

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)


class OptimizerConfig(Section):
    """AdamW; `FP32StateAdamWeightDecay` is MindFormers' name of the same rule."""

    type: Literal["AdamW", "FP32StateAdamWeightDecay"] = "AdamW"
    betas: tuple[float, float] = (0.9, 0.95)
    beta1: float | None = None
    beta2: float | None = None
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.moments):
            raise ValueError(f"betas must be in [0, 1), got {self.moments}")
        return self

    @property
    def moments(self) -> tuple[float, float]:
        """beta1 and beta2, whichever way they were written."""
        beta1, beta2 = self.betas
        return beta1 if self.beta1 is None else self.beta1, beta2 if self.beta2 is None else self.beta2


class LrScheduleConfig(Section):
    """The learning rate over the run; `total_steps` of -1 takes the steps of the run."""

    type: ScheduleType = "CosineWithWarmUpLR"
    learning_rate: float = Field(gt=0)
    lr_end: float = Field(default=0.0, ge=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    total_steps: int = Field(default=-1, ge=-1)

    @model_validator(mode="after")
    def _check(self) -> LrScheduleConfig:
        if self.lr_end > self.learning_rate:
            raise ValueError(f"lr_end={self.lr_end} is above learning_rate={self.learning_rate}")
        return self


class DataLoaderConfig(Section):
    """Where the records are: one MindRecord file, or a directory of them."""

    type: Literal["MindDataset"] = "MindDataset"
    dataset_dir: str = ""
    shuffle: bool = True


class DatasetConfig(Section):
    """Training or held-out data; the batch size is `runner_config.batch_size`, the last word in MindFormers too."""

    data_loader: DataLoaderConfig = DataLoaderConfig()
    input_columns: tuple[str, ...] = ("input_ids", "labels")
    num_parallel_workers: int = Field(default=2, ge=1)
    drop_remainder: Literal[True] = True


class RunnerWrapperConfig(Section):
    """Gradient clipping by global norm, what is added to the loss, its scaling, and a moving average of the weights.

    The scale falls by `loss_scale_factor` at an overflow and rises by it after `scale_window` good steps; 1 keeps it.
    Without `ema_decay` there is no average.
    """

    use_clip_grad: bool = True
    max_grad_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)
    loss_scale_value: float = Field(default=1.0, ge=1)
    loss_scale_factor: float = Field(default=1.0, ge=1)
    scale_window: int = Field(default=1000, ge=1)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)


class RecomputeConfig(Section):
    """What the backward pass computes again to save memory: whole layers, or the two wide products of each.

    MindFormers takes a number of layers for each stage too; any number but zero is every layer here.
    """

    recompute: bool = False
    select_recompute: bool = False

    @field_validator("recompute", "select_recompute", mode="before")
    @classmethod
    def _layers_of_stages(cls, value: object) -> object:
        return any(value) if isinstance(value, list) and all(isinstance(count, int) for count in value) else value

    @property
    def policy(self) -> RecomputePolicy:
        """The one that saves most of those that are asked for."""
        if self.recompute:
            return "full"
        return "select" if self.select_recompute else "none"


class CheckpointMonitorConfig(Section):
    """Checkpoints to resume from, every so many steps; the newest ones are kept."""

    type: Literal["CheckpointMonitor"]
    save_checkpoint_steps: int = Field(default=100, ge=1)
    keep_checkpoint_max: int = Field(default=2, ge=1)
    async_save: bool = False


class TensorBoardConfig(Section):
    """Where scalars are written for TensorBoard; in `output_dir` if the path is relative."""

    tensorboard_dir: str = "tensorboard"
