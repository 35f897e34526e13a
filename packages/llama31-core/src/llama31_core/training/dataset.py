"""Training data: MindRecord files in, batches of tokens and labels out.

A record holds `seq_length + 1` token ids and as many labels, where `labels[i]` is `input_ids[i]` or -100. The shift by
one happens here: T tokens predict the T labels that stand one place further on.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
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
IGNORED_LABEL = -100

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
            raise DatasetError(f"{path} cannot be read as MindRecord: {_reason(error)}") from error
        if self.num_records < batch_size:
            raise DatasetError(f"{path} holds {self.num_records} records, less than one batch of {batch_size}")
        if self.num_records % batch_size:
            _LOG.warning("%d of %d records do not fill a batch", self.num_records % batch_size, self.num_records)
        self.steps_per_epoch = self.num_records // batch_size
        self._batches = records.batch(batch_size, drop_remainder=True)
        self._width = seq_length + 1
        self._vocab_size = config.vocab_size
        self._path = path

    def epochs(self, count: int) -> Iterator[Batch]:
        """Tokens (B, T) and labels (B, T) of `count` passes over the data, each in an order of its own.

        Raises:
            DatasetError: damaged data, records of another width, or ids that the vocabulary does not have.
        """
        for batch in self._read(count):
            ids, labels = (batch[column] for column in _COLUMNS)
            if ids.shape[1] != self._width or labels.shape != ids.shape:
                raise DatasetError(
                    f"{self._path} has records of {ids.shape[1]} ids and {labels.shape[1]} labels, expected "
                    f"{self._width} of each; set model.model_config.seq_length to {ids.shape[1] - 1}"
                )
            known = (ids >= 0) & (ids < self._vocab_size)
            known &= (labels == IGNORED_LABEL) | ((labels >= 0) & (labels < self._vocab_size))
            if not known.all():
                raise DatasetError(
                    f"{self._path} has ids or labels outside the vocabulary of {self._vocab_size} (labels may be "
                    f"{IGNORED_LABEL}); preprocess again with the model's own tokenizer"
                )
            yield ids[:, :-1], labels[:, 1:]

    def _read(self, count: int) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            iterator = self._batches.create_dict_iterator(num_epochs=count, output_numpy=True)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # the iterator puts its own in their place
                    signal.signal(number, handler)
            for _ in range(count):
                yield from iterator
        except RuntimeError as error:
            raise DatasetError(f"{self._path} cannot be read to its end: {_reason(error)}; preprocess again") from error


def find_records(path: Path) -> list[Path]:
    """The MindRecord files at a path: itself, its numbered parts, or those of a directory (with a `.db` each)."""
    if path.is_file():
        return [path]
    if path.is_dir():
        name, folder = r".*", path
    else:
        name, folder = re.escape(path.name) + r"\d+", path.parent
    indexes = folder.glob("*.db") if folder.is_dir() else []
    named = (index.with_suffix("") for index in indexes if re.fullmatch(name, index.stem))
    files = sorted(file for file in named if file.is_file())
    if not files:
        raise DatasetError(
            f"{path} holds no MindRecord file; set train_dataset.data_loader.dataset_dir to what llama31-data wrote"
        )
    return files


def _reason(error: Exception) -> str:
    """The line of MindSpore's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("-", "Exception thrown"))]
    return (told or ["no reason given"])[0]


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
    if not isinstance(manifest, dict) or not isinstance(manifest.get("vocab_size"), int):
        raise DatasetError(f"{path} is no manifest of llama31-data (no vocab_size in it); preprocess again")
    if manifest.get("seq_length") != seq_length:
        raise DatasetError(
            f"{path}: the data has seq_length {manifest.get('seq_length')}, the run {seq_length}; "
            f"set model.model_config.seq_length, or preprocess again"
        )
    if manifest["vocab_size"] > config.vocab_size:
        raise DatasetError(
            f"{path}: the data's tokenizer has {manifest['vocab_size']} tokens, the model {config.vocab_size}; "
            f"preprocess again with the model's own tokenizer"
        )
    packed = set(manifest.get("columns", _COLUMNS)) - set(_COLUMNS)
    if packed:
        raise DatasetError(
            f"{path}: the records are packed (they have {', '.join(sorted(packed))}), and training here would let "
            f"documents see each other; preprocess without --packing"
        )
    bos, eos = manifest.get("bos_token_id"), manifest.get("eos_token_id")
    if None not in (bos, config.bos_token_id) and bos != config.bos_token_id:
        raise DatasetError(f"{path}: the data has bos id {bos}, the model {config.bos_token_id}; preprocess again")
    if eos is not None and config.eos_token_ids and eos not in config.eos_token_ids:
        raise DatasetError(f"{path}: the data has eos id {eos}, the model {config.eos_token_ids}; preprocess again")
