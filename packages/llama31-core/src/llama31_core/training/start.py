"""What a run begins with: data, weights that training can start from, and room for what it writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama31_core.checkpoint import WeightsReader, check_weights, open_weights
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.lora.adapter import read_adapter
from llama31_core.run_config import RunConfig
from llama31_core.run_config.training import DatasetConfig
from llama31_core.training.dataset import MindRecordDataset
from llama31_core.training.device import training_precision
from llama31_core.training.lora import Lora, adapted_modules, adapter_values, first_values, is_change
from llama31_core.training.weights import TrainedWeights


def check_run(run: RunConfig, source: str, num_ranks: int) -> None:
    """See that the file names what a run needs.

    Raises:
        ConfigError: it does not, or asks for what is not there.
    """
    if not run.load_checkpoint:
        raise ConfigError(f"{source}: load_checkpoint is empty; set it to a model directory")
    if not run.train_dataset.data_loader.dataset_dir:
        raise ConfigError(f"{source}: train_dataset.data_loader.dataset_dir is empty; set it to MindRecord data")
    if run.do_eval and not run.eval_dataset.data_loader.dataset_dir:
        raise ConfigError(f"{source}: eval_dataset.data_loader.dataset_dir is empty; set it, or do_eval=False")
    if run.eval_prompts and not run.do_eval:
        raise ConfigError(f"{source}: eval_prompts are completed at evaluations; set do_eval=True")
    training_precision(run.model_section.compute_dtype)
    if run.parallel.world_size != num_ranks:
        raise ConfigError(f"{source}: parallel_config makes {run.parallel.world_size} ranks, {num_ranks} are there")
    if num_ranks > 1 and run.eval_prompts:
        raise ConfigError(f"{source}: eval_prompts are completed by one process alone; leave them out on several ranks")
    if num_ranks > 1 and run.model_section.pet_config is not None:
        raise ConfigError(f"{source}: pet_config trains on one rank; set use_parallel=False, or leave it out")


def open_data(
    run: RunConfig, section: DatasetConfig, config: ModelConfig, batch_size: int, rank: int, num_ranks: int
) -> MindRecordDataset:
    """The data of a section; `rank` and `num_ranks` as there.

    Raises:
        DatasetError: see MindRecordDataset.
    """
    return MindRecordDataset(
        section.data_loader.dataset_dir,
        config,
        seq_length=run.model_section.seq_length,
        batch_size=batch_size,
        seed=run.seed if section.data_loader.shuffle else None,
        num_workers=section.num_parallel_workers,
        rank=rank,
        num_ranks=num_ranks,
        tokenizer_dir=Path(run.load_checkpoint),
    )


def plan_lora(run: RunConfig, config: ModelConfig) -> Lora | None:
    """What is adapted, if not everything is trained."""
    pet = run.model_section.pet_config
    if pet is None:
        return None
    return Lora(adapted_modules(pet.target_modules, config.n_layers), pet.lora_rank, pet.lora_alpha)


def load_values(weights: TrainedWeights, model_dir: Path, lora: Lora | None, resumed: Path | None, seed: int) -> None:
    """Fill the weights from the model, or from the checkpoint that a run goes on from.

    Raises:
        CheckpointError: missing, of another shape, or no numbers.
    """
    with open_weights(model_dir if resumed is None or lora is not None else resumed) as reader:
        check_weights(reader, weights.config)
        read = finite(reader)
        adapter = read_adapter(resumed) if resumed is not None and lora is not None else None

        def read_any(name: str) -> Array:
            if lora is None or not is_change(name):
                return read(name)
            if adapter is None:
                return first_values(name, weights.shape(name), seed)
            return adapter_values(adapter, lora, name)

        weights.load(read_any)


def finite(weights: WeightsReader) -> Callable[[str], Array]:
    """Reads weights, and refuses values that no training could start from."""

    def read(name: str) -> Array:
        return require_finite(weights.read(name), name, weights.source)

    return read


def require_finite(value: Array, name: str, source: Path) -> Array:
    """The values of a weight. Raises CheckpointError if some are no numbers."""
    if not np.isfinite(value.astype(np.float32)).all():
        raise CheckpointError(f"{source}: {name} holds values that are no numbers; use another checkpoint")
    return value


def check_room(destination: Path, needed_bytes: int) -> None:
    """See that a result of this size can be written, before the work for it is done."""
    place = next(parent for parent in destination.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".llama31-"):
            free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        raise ConfigError(f"output_dir: {destination} cannot be written: {error.strerror}; set another") from error
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"output_dir: {destination} needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free there"
        )
