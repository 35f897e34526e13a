"""What is planned: a run file in, the sizes that memory, traffic and time follow from out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.schedule import check_micro_batches
from llama31_core.parallel.sequence import check_sequence
from llama31_core.plan.hardware import Device
from llama31_core.precision import DtypeName, Precision
from llama31_core.run_config import ModelSection, PredictConfig, RunConfig
from llama31_core.run_config.training import RecomputePolicy


@dataclass(frozen=True)
class NumberBytes:
    """Bytes of a number in matrices, in what flows between layers (and its gradients), and in both moments together.

    Gradients have their weight's type. AdamW's two moments are float32, and there is no further copy of the weights.
    """

    weights: int
    activations: int
    moments: int = 8

    @classmethod
    def on(cls, device: Device, param: DtypeName, compute: DtypeName) -> NumberBytes:
        """What a device computes in when a run file asks for these types: a CPU in float32, whatever it says."""
        precision = Precision(param, compute) if device.is_fused else Precision()
        return cls(precision.param_bytes, precision.compute_bytes)


@dataclass(frozen=True)
class TrainWorkload:
    """A step of training.

    Attributes:
        seq_length: tokens of a sequence.
        batch_size: sequences of a micro-batch of one data parallel replica.
        micro_batches: of a step and replica.
        recompute: what the backward pass computes again.
        has_average: a moving average of the weights is kept.
    """

    config: ModelConfig
    parallel: ParallelConfig
    seq_length: int
    batch_size: int
    micro_batches: int
    recompute: RecomputePolicy
    param_type: DtypeName = "bfloat16"
    compute_type: DtypeName = "bfloat16"
    has_average: bool = False

    @classmethod
    def of(cls, run: RunConfig, source: str) -> TrainWorkload:
        """That of a run file.

        Raises:
            ConfigError: the model does not divide over the mesh, or the run trains no whole weights.
        """
        section = run.model_section
        if section.pet_config is not None:
            raise ConfigError(
                f"{source}: model.model_config.pet_config is set, plan counts the training of all weights"
            )
        config = _architecture(run, section, source)
        micro_batches = run.runner_config.gradient_accumulation_steps
        if run.parallel.pp > 1:  # as the trainer counts: micro_batch_num is of a pipeline
            micro_batches *= run.parallel_config.micro_batch_num
        workload = cls(
            config,
            run.parallel,
            section.seq_length,
            run.runner_config.batch_size,
            micro_batches,
            run.recompute_config.policy,
            "float32",  # the trainer's weights, whatever param_init_type says: training/device.py
            section.compute_dtype,
            run.runner_wrapper.ema_decay is not None,
        )
        workload.check(source)
        return workload

    def check(self, source: str) -> None:
        """See that the sizes fit each other.

        Raises:
            ConfigError: naming what does not.
        """
        parallel = self.parallel
        parallel.check(self.config)
        try:
            check_sequence(parallel, self.seq_length)
            if parallel.pp > 1:
                check_micro_batches(parallel.pp, parallel.interleave, self.micro_batches)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one rank."""
        return self.batch_size * self.seq_length // self.parallel.cp

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.batch_size * self.seq_length * self.micro_batches * self.parallel.dp


@dataclass(frozen=True)
class PredictWorkload:
    """An engine.

    Attributes:
        seq_length: tokens that a request may have.
        block_size, num_blocks: of the cache.
        chunk_tokens: of a prompt that are computed at once.
        max_batch_size: requests that run at once.
    """

    config: ModelConfig
    parallel: ParallelConfig
    seq_length: int
    block_size: int
    num_blocks: int
    chunk_tokens: int
    max_batch_size: int
    param_type: DtypeName = "bfloat16"
    compute_type: DtypeName = "bfloat16"

    @classmethod
    def of(cls, run: PredictConfig, source: str) -> PredictWorkload:
        """That of a run file; what it does not say is as in `EngineOptions`.

        Raises:
            ConfigError: the model does not divide over the mesh.
        """
        from llama31_core.inference.options import EngineOptions

        section, options = run.model_section, EngineOptions()
        config = _architecture(run, section, source)
        run.parallel.check(config)
        return cls(
            config,
            run.parallel,
            section.seq_length,
            section.block_size,
            section.num_blocks,
            options.max_prefill_tokens,
            options.max_batch_size,
            section.param_init_type,
            section.compute_dtype,
        )


def _architecture(run: RunConfig | PredictConfig, section: ModelSection, source: str) -> ModelConfig:
    """That of the model directory that the file names, if it is there, with which the file must agree; else the file's.

    Raises:
        ConfigError: neither says it, or they differ.
    """
    if not run.load_checkpoint or not (Path(run.load_checkpoint) / "config.json").is_file():
        return section.architecture(source)
    config = ModelConfig.from_pretrained(run.load_checkpoint)
    section.check_against(config, source)
    return config
