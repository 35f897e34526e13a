"""Training data: MindRecord files in, batches of tokens and labels out.

A record holds `seq_length + 1` token ids and as many labels, where `labels[i]` is `input_ids[i]` or -100. The shift by
one happens here: T tokens predict the T labels that stand one place further on. Packed records have `segment_ids` and
`position_ids` too, which say what document a token belongs to and its place there.
"""

from __future__ import annotations

import hashlib
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
from llama31_core.training.batch import IGNORED_LABEL, Batch

_LOG = logging.getLogger(__name__)
_MANIFEST_SUFFIX = ".manifest.json"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_COLUMNS = ["input_ids", "labels"]
_PACKED_COLUMNS = ["segment_ids", "position_ids"]


class MindRecordDataset:
    """Batches of a MindRecord file, or of all those of a directory.

    The order of an epoch is worked out from the seed, so a step is the same records whether a run began there or came
    there from the beginning.

    Args:
        path: what `llama31-data preprocess --output_file` named, or a directory of such files.
        config: the model, whose vocabulary and special ids the data must have been made for.
        seq_length: tokens of a training sequence.
        batch_size: sequences of a batch; records that do not fill one are left out, and the log says how many.
        seed: of the shuffle; None keeps the order of the records.
        num_workers: threads that read.
        rank, num_ranks: of this process among those that share the data; a global batch is `num_ranks` batches.
        tokenizer_dir: a model directory, whose tokenizer the data must have been made with; None goes unchecked.

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
        rank: int = 0,
        num_ranks: int = 1,
        tokenizer_dir: Path | None = None,
    ) -> None:
        self._files = [str(file) for file in find_records(Path(path))]
        manifests = sorted({Path(file).with_name(Path(file).name + _MANIFEST_SUFFIX) for file in self._files})
        packed = {check_manifest(manifest, config, seq_length, tokenizer_dir) for manifest in manifests}
        if len(packed) > 1:
            raise DatasetError(f"{path} holds packed records and others; train on one kind")
        self._columns = _COLUMNS + (_PACKED_COLUMNS if packed == {True} else [])
        self._path, self._seed, self._num_workers = path, seed, num_workers
        self._width, self._vocab_size = seq_length + 1, config.vocab_size
        self._batch_size, self._rank, self._num_ranks = batch_size, rank, num_ranks
        try:
            self.num_records: int = ds.MindDataset(self._files, columns_list=self._columns).get_dataset_size()
        except (RuntimeError, ValueError) as error:
            raise DatasetError(f"{path} cannot be read as MindRecord: {_reason(error)}") from error
        step_records = batch_size * num_ranks
        if self.num_records < step_records:
            raise DatasetError(f"{path} holds {self.num_records} records, less than one batch of {step_records}")
        if self.num_records % step_records:
            _LOG.warning("%d of %d records do not fill a batch", self.num_records % step_records, self.num_records)
        self.batches_per_epoch = self.num_records // step_records

    @property
    def is_packed(self) -> bool:
        """Whether a record holds several documents."""
        return len(self._columns) > len(_COLUMNS)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches without end, epoch after epoch, from number `start` on.

        Raises:
            DatasetError: damaged data, records of another width, or ids that the vocabulary does not have.
        """
        epoch, done = divmod(start, self.batches_per_epoch)
        while True:
            numbers = self._order(epoch)[done:]
            for row, columns in zip(numbers, self._read(numbers, self._batch_size), strict=True):
                yield self._checked(columns, tuple(row.tolist()))
            epoch, done = epoch + 1, 0

    def every_record(self, batch_size: int) -> Iterator[Batch]:
        """This rank's share of all records once, in their order; the last batch is filled up with rows without labels.

        Raises:
            DatasetError: as `batches`.
        """
        own = np.arange(self.num_records)
        own = own[own // batch_size % self._num_ranks == self._rank]
        if not len(own):
            return
        starts = range(0, len(own), batch_size)
        for start, columns in zip(starts, self._read(own, batch_size), strict=True):
            numbers = own[start : start + batch_size]
            filling = ((0, batch_size - len(numbers)), (0, 0))
            filled = {name: np.pad(column, filling, mode="edge") for name, column in columns.items()}
            filled["labels"][len(numbers) :] = IGNORED_LABEL
            yield self._checked(filled, tuple(numbers.tolist()))

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Record numbers (batches, batch_size) of this rank in an epoch."""
        order = np.arange(self.num_records)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(self.num_records)
        used = order[: self.batches_per_epoch * self._batch_size * self._num_ranks]
        return used.reshape(self.batches_per_epoch, self._num_ranks, self._batch_size)[:, self._rank]

    def _checked(self, columns: dict[str, npt.NDArray[np.int32]], numbers: tuple[int, ...]) -> Batch:
        ids, labels = columns["input_ids"], columns["labels"]
        if any(column.shape != ids.shape for column in columns.values()) or ids.shape[1] != self._width:
            widths = ", ".join(f"{column.shape[1]} {name}" for name, column in columns.items())
            raise DatasetError(
                f"{self._path} has records of {widths}, expected {self._width} of each; "
                f"set model.model_config.seq_length to {ids.shape[1] - 1}"
            )
        known = (ids >= 0) & (ids < self._vocab_size)
        known &= (labels == IGNORED_LABEL) | ((labels >= 0) & (labels < self._vocab_size))
        if not known.all():
            raise DatasetError(
                f"{self._path} has ids or labels outside the vocabulary of {self._vocab_size} (labels may be "
                f"{IGNORED_LABEL}); preprocess again with the model's own tokenizer"
            )
        if not self.is_packed:
            return Batch.unpacked(_cut(ids, last=False), _cut(labels, last=True), numbers)
        segments, positions = columns["segment_ids"], columns["position_ids"]
        if (positions < 0).any() or (positions >= self._width).any():
            raise DatasetError(f"{self._path} has position_ids outside 0 to {self._width - 1}; preprocess again")
        # The first token of a document is nothing that the last one of the document before it could predict.
        targets = np.where(segments[:, 1:] == segments[:, :-1], labels[:, 1:], np.int32(IGNORED_LABEL))
        tokens, positions, segments = (_cut(column, last=False) for column in (ids, positions, segments))
        return Batch(tokens, targets, positions, segments, numbers)

    def _read(self, numbers: npt.NDArray[np.int64], batch_size: int) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            records = ds.MindDataset(
                self._files,
                columns_list=self._columns,
                num_parallel_workers=self._num_workers,
                sampler=ds.SubsetSampler(numbers.ravel().tolist()),
            )
            batches = records.batch(batch_size)
            iterator = batches.create_dict_iterator(num_epochs=1, output_numpy=True)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # the iterator puts its own in their place
                    signal.signal(number, handler)
            yield from iterator
        except RuntimeError as error:
            raise DatasetError(f"{self._path} cannot be read to its end: {_reason(error)}; preprocess again") from error


def _cut(column: npt.NDArray[np.int32], *, last: bool) -> npt.NDArray[np.int32]:
    """Without its first element, or without its last."""
    return np.ascontiguousarray(column[:, 1:] if last else column[:, :-1])


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


def read_seq_length(path: Path) -> int:
    """The tokens of a training sequence of this data, from its manifest.

    Raises:
        DatasetError: there is no manifest.
    """
    file = find_records(path)[0]
    manifest = file.with_name(file.name + _MANIFEST_SUFFIX)
    try:
        return int(json.loads(manifest.read_text(encoding="utf-8"))["seq_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{manifest} says no seq_length ({error}); preprocess again with llama31-data") from error


def check_manifest(path: Path, config: ModelConfig, seq_length: int, tokenizer_dir: Path | None = None) -> bool:
    """Compare what the data was made for with what is to be trained; gives whether the records are packed.

    Raises:
        DatasetError: naming the first field that differs. Data of other tools has no manifest: a warning says so.
    """
    if not path.is_file():
        _LOG.warning("%s does not exist: the data's vocabulary and sequence length go unchecked", path)
        return False
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
    _check_tokenizer(path, manifest.get("tokenizer_sha256"), tokenizer_dir)
    counts = manifest.get("counts")
    if isinstance(counts, dict) and counts.get("label_tokens") == 0:
        raise DatasetError(
            f"{path}: no token of the data is trained on (every label is {IGNORED_LABEL}); preprocess again, with a "
            "longer --seq_length if answers were cut off"
        )
    columns = set(manifest.get("columns", _COLUMNS))
    if columns not in (set(_COLUMNS), set(_COLUMNS + _PACKED_COLUMNS)):
        raise DatasetError(
            f"{path}: the records have {', '.join(sorted(columns))}, expected {', '.join(_COLUMNS)}, and "
            f"{', '.join(_PACKED_COLUMNS)} if packed; preprocess again"
        )
    bos, eos = manifest.get("bos_token_id"), manifest.get("eos_token_id")
    if None not in (bos, config.bos_token_id) and bos != config.bos_token_id:
        raise DatasetError(f"{path}: the data has bos id {bos}, the model {config.bos_token_id}; preprocess again")
    if eos is not None and config.eos_token_ids and eos not in config.eos_token_ids:
        raise DatasetError(f"{path}: the data has eos id {eos}, the model {config.eos_token_ids}; preprocess again")
    return columns != set(_COLUMNS)


def _check_tokenizer(path: Path, used: str | None, tokenizer_dir: Path | None) -> None:
    files = [tokenizer_dir / name for name in _TOKENIZER_FILES] if tokenizer_dir is not None else []
    own = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
    if used is not None and own and used not in own.values():
        known = ", ".join(f"{file} is {digest[:12]}…" for file, digest in own.items())
        raise DatasetError(
            f"{path}: the data's tokenizer has sha256 {used[:12]}…, {known}; preprocess again with "
            f"--model_file {tokenizer_dir}"
        )
