"""The YAML files that `finetune` takes: a file and `section.key=value` overrides in, a typed `RunConfig` out.

Sections and keys have MindFormers' names, so its files load. A key of theirs that means nothing here is named, with the
reason, in one warning; any other unknown key is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.training.schedule import ScheduleType
from llama31_core.validation import did_you_mean, first_problem

_LOG = logging.getLogger(__name__)


class Section(BaseModel):
    """A section of the file: typed, frozen, no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RunnerConfig(Section):
    """How long to train and on how much at once."""

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)


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
    """The training data; the batch size is `runner_config.batch_size`, which had the last word in MindFormers too."""

    data_loader: DataLoaderConfig = DataLoaderConfig()
    input_columns: tuple[str, ...] = ("input_ids", "labels")
    num_parallel_workers: int = Field(default=2, ge=1)
    drop_remainder: Literal[True] = True


class RunnerWrapperConfig(Section):
    """Gradient clipping by global norm."""

    use_clip_grad: bool = True
    max_grad_norm: float = Field(default=1.0, gt=0)


# The architecture keys of MindFormers' LlamaConfig -> ModelConfig's.
_ARCHITECTURE_KEYS = {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "theta": "rope_theta",
}


class ModelSection(Section):
    """What of the model is a matter of the run; architecture keys may stand here and must then fit the checkpoint."""

    seq_length: int = Field(default=2048, ge=1)
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    n_kv_heads: int | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None
    rms_norm_eps: float | None = None
    theta: float | None = None
    ignore_token_id: Literal[-100] = -100

    def check_against(self, config: ModelConfig, source: str) -> None:
        """Compare the architecture keys that are given with the checkpoint's config.

        Raises:
            ConfigError: they differ, or `seq_length` is beyond the model's context.
        """
        for key, ours in _ARCHITECTURE_KEYS.items():
            given, has = getattr(self, key), getattr(config, ours)
            if given is not None and given != has:
                raise ConfigError(
                    f"{source}: model.model_config.{key} is {given}, the checkpoint's is {has}; remove the key"
                )
        if self.seq_length > config.max_seq_len:
            raise ConfigError(
                f"{source}: model.model_config.seq_length is {self.seq_length}, beyond the model's context of "
                f"{config.max_seq_len}"
            )


class ModelBlock(Section):
    """The `model` section."""

    model_config_: ModelSection = Field(default=ModelSection(), alias="model_config")


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


# MindFormers' keys that have no meaning here, by dotted name; a section's name covers all that is in it.
_DEAD_KEYS = {
    "src_strategy_path_or_dir": "a rank reads its slices of any checkpoint, so the source's layout is not asked for",
    "only_save_strategy": "layouts come from a table and need no saving",
    "trainer": "there is one trainer",
    "runner_config.sink_mode": "data is fed step by step",
    "runner_config.sink_size": "data is fed step by step",
    "train_dataset.python_multiprocessing": "records are ready-made and no Python runs per record",
    "train_dataset.batch_size": "runner_config.batch_size decides",
    "train_dataset.numa_enable": "the operating system places the workers",
    "train_dataset.prefetch_size": "MindSpore's default serves",
    "train_dataset_task": "it repeats train_dataset",
    "runner_wrapper.type": "there is one training step",
    "model.arch": "there is one architecture",
    "model.model_config.type": "there is one architecture",
    "model.model_config.batch_size": "batches are as large as runner_config.batch_size says",
    "model.model_config.use_past": "training keeps no cache",
    "model.model_config.use_flash_attention": "the device decides",
    "model.model_config.checkpoint_name_or_path": "load_checkpoint decides",
    "auto_tune": "it was a MindFormers tool",
    "filepath_prefix": "it was a MindFormers tool",
    "autotune_per_step": "it was a MindFormers tool",
    "remote_save_url": "it was a cloud platform's",
}


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and put `section.key=value` overrides over it; the values are parsed as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value that does not fit.
    """
    source = str(path)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist; give a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {type(values).__name__}, expected sections with keys")
    for override in overrides:
        _override(values, override)
    _drop_dead_keys(values, source)
    for dotted, known in _unknown_keys(values, RunConfig):
        raise ConfigError(f"{source}: unknown key {dotted!r}; {did_you_mean(dotted.rpartition('.')[2], known)}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from error


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = dotted.split(".")
    for name in sections:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {name!r} is a value and has no keys in it")
    try:
        values[key] = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def _drop_dead_keys(values: dict[str, Any], source: str) -> None:
    found = []
    for dotted, reason in _DEAD_KEYS.items():
        *sections, key = dotted.split(".")
        holder: Any = values
        for name in sections:
            holder = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and key in holder:
            del holder[key]
            found.append(f"{dotted} ({reason})")
    if found:
        _LOG.warning("%s: %d keys have no effect here: %s", source, len(found), "; ".join(found))


def _unknown_keys(values: Mapping[str, Any], section: type[BaseModel], at: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted names of keys that no section has, each with the names that its section has."""
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    for key, value in values.items():
        if key not in fields:
            yield f"{at}{key}", list(fields)
            continue
        kind = fields[key].annotation
        inner = next((t for t in (kind, *get_args(kind)) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if inner is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, inner, f"{at}{key}.")
