"""A whole run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama31_core.run_config.model_section import ModelBlock, ModelSection
from llama31_core.run_config.section import Section
from llama31_core.run_config.training import (
    DatasetConfig,
    LrScheduleConfig,
    OptimizerConfig,
    RunnerConfig,
    RunnerWrapperConfig,
)


class RunConfig(Section):
    """A whole file."""

    run_mode: Literal["finetune", "train"] = "finetune"
    seed: int = Field(default=0, ge=0, lt=2**32)
    output_dir: str = "./output"
    load_checkpoint: str = ""
    runner_config: RunnerConfig = RunnerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LrScheduleConfig
    train_dataset: DatasetConfig = DatasetConfig()
    runner_wrapper: RunnerWrapperConfig = RunnerWrapperConfig()
    model: ModelBlock = ModelBlock()

    @property
    def model_section(self) -> ModelSection:
        """`model.model_config`."""
        return self.model.model_config_
