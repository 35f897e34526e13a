"""Whole run files: what all have, what one that trains has, what one that predicts has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.run_config.model_section import (
    ModelBlock,
    ModelSection,
    PredictModelBlock,
    PredictModelSection,
    TrainModelSection,
)
from llama31_core.run_config.parallel_section import ParallelConfigSection, ParallelContext, mesh_of
from llama31_core.run_config.section import Section
from llama31_core.run_config.training import (
    CheckpointMonitorConfig,
    DatasetConfig,
    LrScheduleConfig,
    OptimizerConfig,
    RecomputeConfig,
    RunnerConfig,
    RunnerWrapperConfig,
    TensorBoardConfig,
)


class AnyRunConfig(Section):
    """What every file has; `use_parallel: False` is one device, whatever `parallel_config` says."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    output_dir: str = "./output"
    load_checkpoint: str = ""
    auto_trans_ckpt: bool = False
    use_parallel: bool = False
    parallel_context: ParallelContext = Field(default=ParallelContext(), alias="parallel")
    parallel_config: ParallelConfigSection = ParallelConfigSection()

    def _mesh(self, section: ModelSection) -> ParallelConfig:
        """The mesh of devices."""
        if not self.use_parallel:
            return ParallelConfig()
        return mesh_of(self.parallel_config, self.parallel_context, section.offset, section.pp_interleave_num)


class RunConfig(AnyRunConfig):
    """A file that trains.

    With `do_eval` it evaluates on `eval_dataset` before the first step, every `eval_step_interval` steps (every
    `eval_epoch_interval` epochs if that is -1) and after the last, and completes `eval_prompts`.
    """

    run_mode: Literal["finetune", "train"] = "finetune"
    runner_config: RunnerConfig = RunnerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LrScheduleConfig
    train_dataset: DatasetConfig = DatasetConfig()
    runner_wrapper: RunnerWrapperConfig = RunnerWrapperConfig()
    recompute_config: RecomputeConfig = RecomputeConfig()
    callbacks: tuple[CheckpointMonitorConfig, ...] = Field(default=(), max_length=1)
    resume_training: bool = False
    do_eval: bool = False
    eval_step_interval: int = Field(default=-1, ge=-1)
    eval_epoch_interval: int = Field(default=1, ge=1)
    eval_dataset: DatasetConfig = DatasetConfig()
    eval_prompts: tuple[str, ...] = ()
    eval_max_tokens: int = Field(default=48, ge=1)
    tensorboard: TensorBoardConfig | None = None
    model: ModelBlock = ModelBlock()

    @property
    def model_section(self) -> TrainModelSection:
        """`model.model_config`."""
        return self.model.model_config_

    @property
    def parallel(self) -> ParallelConfig:
        """The mesh of devices."""
        return self._mesh(self.model_section)


class TokenizerSection(Section):
    """`processor.tokenizer`."""

    vocab_file: str = ""


class ProcessorSection(Section):
    """`processor`; `add_bos_token` begins every prompt with the model's bos token."""

    tokenizer: TokenizerSection = TokenizerSection()


class PredictConfig(AnyRunConfig):
    """A file that predicts."""

    run_mode: Literal["predict"]
    add_bos_token: bool = False
    resume_training: Literal[False] = False
    model: PredictModelBlock = PredictModelBlock()
    processor: ProcessorSection = ProcessorSection()

    @model_validator(mode="after")
    def _check(self) -> PredictConfig:
        section = self.model_section
        if section.num_blocks * section.block_size < section.seq_length:
            raise ValueError(
                f"model.model_config.num_blocks={section.num_blocks} of block_size={section.block_size} tokens hold "
                f"fewer than seq_length={section.seq_length}; raise num_blocks"
            )
        return self

    @property
    def model_section(self) -> PredictModelSection:
        """`model.model_config`."""
        return self.model.model_config_

    @property
    def parallel(self) -> ParallelConfig:
        """The mesh of devices."""
        return self._mesh(self.model_section)
