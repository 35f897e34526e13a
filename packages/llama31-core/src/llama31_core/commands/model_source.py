"""What a command runs: a model directory, or a run file of MindFormers' form that names weights and vocabulary."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama31_core.config import ModelConfig
from llama31_core.device import device_target
from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.precision import Precision
from llama31_core.run_config import PredictConfig, load_predict_config
from llama31_tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model, and what a run file says of running it; flags of the command line come before that.

    Attributes:
        config: the architecture.
        weights: model directory or weight file.
        tokenizer: the model's.
        engine: arguments of EngineOptions.
        sampling: arguments of SamplingParams; None without a run file.
        max_length: tokens of prompt and answer together (`max_decode_length`); None without a run file.
        seed: of what is drawn at random.
        add_bos_token: raw prompts begin with bos.
        precision: number types on Ascend; None without a run file.
        parallel: the ranks that it runs over.
        run_file: what messages call the file.
    """

    config: ModelConfig
    weights: Path
    tokenizer: Tokenizer
    engine: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, Any] | None = None
    max_length: int | None = None
    seed: int | None = None
    add_bos_token: bool = False
    precision: Precision | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run_file: str = ""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model."""
    text = (
        "a model directory, as llama31-ckpt convert writes it, or a weight file in one; with --config any weight file"
    )
    parser.add_argument("model_dir", type=Path, nargs="?", metavar="MODEL_DIR", help=text)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML file with run_mode: predict; other flags come before it"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="put over the value of --config"
    )


def load_source(arguments: argparse.Namespace) -> ModelSource:
    """The model that a command line names.

    Raises:
        ConfigError: nothing names one; a run file that does not load, or says something else than the model's config.
        TokenizerError: no vocabulary.
    """
    if arguments.config is None:
        if arguments.model_dir is None:
            raise ConfigError("no model is named; give MODEL_DIR, or --config with a load_checkpoint")
        if arguments.set:
            raise ConfigError(f"--set {arguments.set[0]} is for a run file; give --config too")
        home = _home(arguments.model_dir)
        return ModelSource(ModelConfig.from_pretrained(home), arguments.model_dir, Tokenizer.from_pretrained(home))
    run = load_predict_config(arguments.config, arguments.set)
    return source_of_run(run, str(arguments.config), arguments.model_dir)


def source_of_run(run: PredictConfig, source: str, weights: Path | None = None) -> ModelSource:
    """What a run file describes; `weights` instead of its load_checkpoint."""
    if weights is None:
        if not run.load_checkpoint:
            raise ConfigError(f"{source}: load_checkpoint is empty; name a model directory or a weight file")
        weights = Path(run.load_checkpoint)
    section = run.model_section
    config = _architecture(run, source, weights)
    return ModelSource(
        config,
        weights,
        _tokenizer(run, source, weights),
        section.engine_values(),
        section.sampling_values(),
        min(section.seq_length, section.max_decode_length),
        run.seed,
        run.add_bos_token,
        section.precision(device_target()),
        _mesh(run, source, config),
        source,
    )


def _mesh(run: PredictConfig, source: str, config: ModelConfig) -> ParallelConfig:
    """The ranks to run over; sequence parallelism saves memory in training alone."""
    parallel = run.parallel.model_copy(update={"sequence_parallel": False})
    for name, size in (("data_parallel", parallel.dp), ("context_parallel", parallel.cp)):
        if size > 1:
            raise ConfigError(
                f"{source}: parallel_config.{name} is {size}, prediction runs over model_parallel and pipeline_stage "
                f"alone; set it to 1"
            )
    try:
        parallel.check(config)
    except ConfigError as error:
        raise ConfigError(f"{source}: parallel_config: {error}") from error
    return parallel


def _home(weights: Path) -> Path:
    """The directory in which configuration and vocabulary lie."""
    return weights.parent if weights.is_file() else weights


def _architecture(run: PredictConfig, source: str, weights: Path) -> ModelConfig:
    """That of the config.json beside the weights, with which the run file must agree, or else that of the run file."""
    if not weights.exists():
        raise ConfigError(f"{source}: load_checkpoint is {str(weights)!r}, and that does not exist")
    home = _home(weights)
    if not (home / "config.json").is_file():
        return run.model_section.architecture(f"{source}: model.model_config (there is no config.json in {home})")
    config = ModelConfig.from_pretrained(home)
    run.model_section.check_against(config, source)
    return config


def _tokenizer(run: PredictConfig, source: str, weights: Path) -> Tokenizer:
    """Of vocab_file, or of the directory of the weights; there what lies beside the vocabulary counts too."""
    home = _home(weights)
    named = run.processor.tokenizer.vocab_file
    if not named:
        return Tokenizer.from_pretrained(home)
    path = Path(named)
    if not path.exists():
        raise ConfigError(f"{source}: processor.tokenizer.vocab_file is {named!r}, and that does not exist")
    if path.is_dir() or path.parent.resolve() == home.resolve():
        return Tokenizer.from_pretrained(path if path.is_dir() else home)
    return Tokenizer.from_file(path)
