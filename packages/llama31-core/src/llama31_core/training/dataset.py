"""Training data: MindRecord files in, batches of tokens and labels out.

A record holds `seq_length + 1` token ids and as many labels, where `labels[i]` is `input_ids[i]` or -100. The shift by
one happens here: T tokens predict the T labels that stand one place further on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore.dataset as ds
import numpy as np
import numpy.typing as npt

from llama31_core.config import ModelConfig
from llama31_core.errors import DatasetError

_LOG = logging.getLogger(__name__)
_MANIFEST_SUFFIX = ".manifest.json"
_COLUMNS = ["input_ids", "labels"]

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


class MindRecordDataset:
    """Batches of a MindRecord file, or of all those of a directory.

    Args:
        path: what `llama31-data preprocess --output_file` named, or a directory of such files.
        config: the model, whose vocabulary and special ids the data must have been made for.
        seq_length: tokens of a training sequence.
        batch_size: sequences of a batch; records that do not fill one are left out, and the log says how many.
        seed: of the shuffle; None keeps the order of the records.
        num_workers: threads that read.

    Raises:
        DatasetError: nothing there, damaged, made for another model or sequence length, or less than one batch.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        *,
        seq_length: int,
        batch_size: int,
        seed: int | None,
        num_workers: int,
    ) -> None:
        files = find_records(Path(path))
        for manifest in sorted({file.with_name(file.name + _MANIFEST_SUFFIX) for file in files}):
            check_manifest(manifest, config, seq_length)
        if seed is not None:
            ds.config.set_seed(seed)
        try:
            records = ds.MindDataset(
                [str(file) for file in files],
                columns_list=_COLUMNS,
                num_parallel_workers=num_workers,
                shuffle=seed is not None,
            )
            self.num_records = records.get_dataset_size()
        except (RuntimeError, ValueError) as error:
            raise DatasetError(f"{path} cannot be read as MindRecord: {str(error).strip().splitlines()[0]}") from error
        if self.num_records < batch_size:
            raise DatasetError(f"{path} holds {self.num_records} records, less than one batch of {batch_size}")
        if self.num_records % batch_size:
            _LOG.warning("%d of %d records do not fill a batch", self.num_records % batch_size, self.num_records)
        self.steps_per_epoch = self.num_records // batch_size
        self._batches = records.batch(batch_size, drop_remainder=True)
        self._width = seq_length + 1
        self._path = path

    def epochs(self, count: int) -> Iterator[Batch]:
        """Tokens (B, T) and labels (B, T) of `count` passes over the data, each in an order of its own."""
        iterator = self._batches.create_dict_iterator(num_epochs=count, output_numpy=True)
        for _ in range(count):
            for batch in iterator:
                ids, labels = (batch[column] for column in _COLUMNS)
                if ids.shape[1] != self._width or labels.shape != ids.shape:
                    raise DatasetError(
                        f"{self._path} has records of {ids.shape[1]} ids and {labels.shape[1]} labels, expected "
                        f"{self._width} of each; set model.model_config.seq_length to {ids.shape[1] - 1}"
                    )
                yield ids[:, :-1], labels[:, 1:]


def find_records(path: Path) -> list[Path]:
    """The MindRecord files at a path: itself, its partitions, or those of a directory (each has a `.db` beside it)."""
    if path.is_file():
        return [path]
    pattern, folder = ("*", path) if path.is_dir() else (path.name + "*", path.parent)
    files = sorted(index.with_suffix("") for index in folder.glob(pattern + ".db") if index.with_suffix("").is_file())
    if not files:
        raise DatasetError(
            f"{path} holds no MindRecord file; set train_dataset.data_loader.dataset_dir to what llama31-data wrote"
        )
    return files


def check_manifest(path: Path, config: ModelConfig, seq_length: int) -> None:
    """Compare what the data was made for with what is to be trained.

    Raises:
        DatasetError: naming the first field that differs. Data of other tools has no manifest: a warning says so.
    """
    if not path.is_file():
        _LOG.warning("%s does not exist: the data's vocabulary and sequence length go unchecked", path)
        return
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}") from error
    if manifest.get("seq_length") != seq_length:
        raise DatasetError(
            f"{path}: the data has seq_length {manifest.get('seq_length')}, the run {seq_length}; "
            f"set model.model_config.seq_length, or preprocess again"
        )
    if manifest.get("vocab_size", 0) > config.vocab_size:
        raise DatasetError(
            f"{path}: the data's tokenizer has {manifest['vocab_size']} tokens, the model {config.vocab_size}; "
            f"preprocess again with the model's own tokenizer"
        )
    bos, eos = manifest.get("bos_token_id"), manifest.get("eos_token_id")
    if None not in (bos, config.bos_token_id) and bos != config.bos_token_id:
        raise DatasetError(f"{path}: the data has bos id {bos}, the model {config.bos_token_id}; preprocess again")
    if eos is not None and config.eos_token_ids and eos not in config.eos_token_ids:
        raise DatasetError(f"{path}: the data has eos id {eos}, the model {config.eos_token_ids}; preprocess again")
