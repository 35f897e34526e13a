"""Checkpoints of a run: its state in, directories that are there whole or not at all out, and the way back.

A checkpoint is a model directory, or with LoRA a PEFT directory, with `optimizer.safetensors` (AdamW's moments) and
`trainer_state.json` beside the weights, so predict and serve take it as it is. The order of the data follows from seed
and step, and nothing else is drawn at random, so these two are the whole state of a run.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from llama31_core import __version__
from llama31_core.checkpoint import WrittenFile, describe_file, save_weights, staged_directory, write_manifest
from llama31_core.checkpoint.files import open_tensor_files
from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.checkpoint.staging import remove_tree
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError
from llama31_core.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from llama31_core.training.lora import Lora, peft_config, peft_name

Arrays = dict[str, npt.NDArray[np.float32]]

Slices = Callable[[str], tuple[slice, ...]]

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8})")
_STATE, _OPTIMIZER, _AVERAGE = "trainer_state.json", "optimizer.safetensors", "ema.safetensors"
_EVALUATION = "evaluation.json"
_KEPT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands.

    Attributes:
        step: steps taken, with those that changed nothing.
        num_updates: updates of the optimiser.
        loss_scale, num_good_steps: of the loss scaling.
        order: what the order of the data follows from; it must be the same to go on.
    """

    step: int
    num_updates: int
    loss_scale: float
    num_good_steps: int
    order: dict[str, int | None]


class ModelFiles:
    """Writes model directories: weights with the config and the tokenizer of the model that was trained."""

    def __init__(self, source_dir: Path, config: ModelConfig) -> None:
        self._source_dir = source_dir
        self._config = config

    def _write(self, directory: Path, weights: Arrays) -> list[WrittenFile]:
        files = save_weights(directory, weights.items())
        files.append(describe_file(self._config.save_pretrained(directory)))
        for name in _KEPT_FILES:
            if (self._source_dir / name).is_file():
                files.append(describe_file(Path(shutil.copy(self._source_dir / name, directory))))
        return files

    def save(
        self, destination: Path, weights: Arrays, step: int, more: Mapping[str, Arrays | Mapping[str, object]]
    ) -> None:
        """Write a directory with `more` files in it, of arrays or in JSON, and rename it into place.

        Raises:
            CheckpointError: values that are no numbers, a full disk, or a destination that exists.
        """
        for name, value in weights.items():
            if not np.isfinite(value).all():
                raise CheckpointError(f"{name} holds values that are no numbers after step {step}; nothing is saved")
        with staged_directory(destination) as directory:
            files = self._write(directory, weights)
            for name, content in more.items():
                if name.endswith(".json"):
                    (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                    files.append(describe_file(directory / name))
                else:
                    files += save_weights(directory / name, cast(Arrays, content).items())
            source = {"format": "finetune", "name": self._source_dir.name, "steps": step}
            write_manifest(directory, files, dtype="float32", source=source, tool=f"llama31-core {__version__}")


class AdapterFiles(ModelFiles):
    """Writes PEFT directories, which hold the changes alone."""

    def __init__(self, source_dir: Path, config: ModelConfig, lora: Lora) -> None:
        super().__init__(source_dir, config)
        self._lora = lora

    def _write(self, directory: Path, weights: Arrays) -> list[WrittenFile]:
        described = directory / CONFIG_NAME
        described.write_text(json.dumps(peft_config(self._lora, str(self._source_dir)), indent=2) + "\n", "utf-8")
        changes = {peft_name(name): value for name, value in weights.items()}
        return [describe_file(described), *save_weights(directory / WEIGHTS_NAME, changes.items())]


class Checkpoints:
    """The checkpoints in a directory.

    Args:
        keep: the newest ones that are not removed.
        is_async: write from a copy while training goes on; one at a time.
    """

    def __init__(self, directory: Path, files: ModelFiles, *, keep: int, is_async: bool) -> None:
        self._directory = directory
        self._files = files
        self._keep = keep
        self._is_async = is_async
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, weights: Arrays, moments: Arrays, state: TrainerState, average: Arrays | None = None) -> None:
        """Write a checkpoint, or begin to; an error of the one before is raised here. `average` is the moving one.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        self.wait()
        if not self._is_async:
            self._write(weights, moments, state, average)
            return
        copied = None if average is None else _copy(average)
        self._pending = self._writer.submit(self._write, _copy(weights), _copy(moments), state, copied)

    def save_best(self, weights: Arrays, step: int, loss: float) -> bool:
        """Write `best_STEP` in the place of the one before, if the held-out loss is lower than that one's.

        It has the weights alone, to be used and not to be resumed from.

        Raises:
            CheckpointError: it could not be written; the one before is as it was.
        """
        self.wait()
        known = sorted(self._directory.glob("best_*")) if self._directory.is_dir() else []
        if any(read_json_object(path / _EVALUATION)["loss"] <= loss for path in known):
            return False
        destination = self._directory / f"best_{step:08d}"
        self._files.save(destination, weights, step, {_EVALUATION: {"step": step, "loss": loss}})
        for path in known:
            remove_tree(path.rename(path.with_name(f".{path.name}.old")))
        return True

    def wait(self) -> None:
        """Return when nothing is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Path | None:
        """The checkpoint of the most steps."""
        found = self._found()
        return found[-1] if found else None

    def clean(self) -> None:
        """Remove what runs that were killed left half-written."""
        for path in [*self._directory.glob(".step_*"), *self._directory.glob(".best_*")]:
            _LOG.warning("%s was left half-written and is removed", path)
            remove_tree(path)

    def _found(self) -> list[Path]:
        paths = self._directory.iterdir() if self._directory.is_dir() else []
        return sorted(path for path in paths if _NAME.fullmatch(path.name))

    def _write(self, weights: Arrays, moments: Arrays, state: TrainerState, average: Arrays | None) -> None:
        destination = self._directory / f"step_{state.step:08d}"
        if destination.exists():
            return  # taken by an earlier run of the same steps, which had the same values
        more: dict[str, Arrays | Mapping[str, object]] = {_OPTIMIZER: moments, _STATE: asdict(state)}
        self._files.save(destination, weights, state.step, more | ({} if average is None else {_AVERAGE: average}))
        for path in self._found()[: -self._keep]:
            # Renamed first: what is half-removed must not look like a checkpoint.
            remove_tree(path.rename(path.with_name(f".{path.name}.old")))


def _copy(arrays: Arrays) -> Arrays:
    return {name: value.copy() for name, value in arrays.items()}


def whole(name: str) -> tuple[slice, ...]:
    """All of a tensor."""
    return ()


def load_checkpoint(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], slices: Slices = whole
) -> tuple[Arrays, TrainerState]:
    """AdamW's moments and the state of a run; the weights are read as those of any model directory.

    Args:
        shapes: of the moments that are wanted, or of this rank's slices of them.
        slices: which part of a moment that is.

    Raises:
        CheckpointError: something is missing, or is of another shape.
    """
    values = read_json_object(directory / _STATE)
    try:
        state = TrainerState(**values)
    except TypeError as error:
        raise CheckpointError(f"{directory / _STATE} is not the state of a run: {error}") from error
    return _load_arrays(directory / _OPTIMIZER, shapes, slices), state


def load_average(directory: Path, shapes: Mapping[str, tuple[int, ...]], slices: Slices = whole) -> Arrays:
    """The moving average of a run; arguments as of `load_checkpoint`.

    Raises:
        CheckpointError: there is none, or it is of another shape.
    """
    return _load_arrays(directory / _AVERAGE, shapes, slices)


def _load_arrays(path: Path, shapes: Mapping[str, tuple[int, ...]], slices: Slices) -> Arrays:
    files = open_tensor_files(path)
    try:
        if not set(shapes) <= set(files.tensors) or (slices is whole and len(files.tensors) > len(shapes)):
            raise CheckpointError(f"{path} is of another model: its names differ")
        arrays = {name: files.read_slice(name, slices(name)).astype(np.float32) for name in shapes}
    finally:
        files.close()
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise CheckpointError(f"{path}: {name} is {array.shape}, expected {shapes[name]}")
    return arrays
