"""A model directory, in our form or in MindFormers' for MindIE, with a predict YAML that says where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama31_core import ModelConfig
from llama31_core.run_config import load_predict_config
from llama31_serve.errors import StartError
from llama31_serve.server.options import check_model_dir


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model's parts are: `weights` is a file, or a directory that holds them."""

    directory: Path
    weights: Path
    tokenizer: Path


def find_model_files(directory: Path) -> ModelFiles:
    """Look into a directory; with one predict*.yaml in it, its load_checkpoint and vocab_file count.

    A path of the YAML that is nowhere may be one of another machine: the file of its name in the directory is meant.

    Raises:
        StartError: no model directory, or a file that the YAML names and nobody has.
        ConfigError: a YAML that contradicts config.json, or does not load.
    """
    yamls = sorted(directory.glob("predict*.yaml")) if directory.is_dir() else []
    if len(yamls) != 1:
        check_model_dir(directory)
        return ModelFiles(directory, directory, directory)
    run = load_predict_config(yamls[0])
    config = ModelConfig.from_pretrained(directory)
    run.model_section.check_against(config, str(yamls[0]))
    if run.use_parallel:
        raise StartError(f"{yamls[0]}: use_parallel is True, but one process serves; set it to False")
    weights = _there(directory, run.load_checkpoint, yamls[0], "load_checkpoint")
    vocabulary = _there(directory, run.processor.tokenizer.vocab_file, yamls[0], "processor.tokenizer.vocab_file")
    if weights == directory:
        check_model_dir(directory)
    beside = vocabulary.parent.resolve() == directory.resolve()  # then the files beside it count too
    return ModelFiles(directory, weights, directory if beside else vocabulary)


def _there(directory: Path, named: str, source: Path, key: str) -> Path:
    if not named:
        return directory
    for path in (Path(named), directory / named, directory / Path(named).name):
        if path.exists():
            return path
    raise StartError(f"{source}: {key} is {named!r}, and there is no such file, nor one of its name in {directory}")
