"""A preprocessed output in, a MindSpore dataset of batches out: this rank's part, shuffled by seed, from any step on.

The order is worked out here and given to MindDataset as a list of record numbers. So a step is the same records
whatever was read before it, going on at a step costs nothing, and the ranks' parts of a step add up to the same records
for any number of ranks (at the same global batch).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama31_data.errors import DataError
from llama31_data.manifest import Manifest, check_files, load_manifest


@dataclass(frozen=True)
class Order:
    """The records of an epoch.

    Attributes:
        records: record numbers, (steps, global batch). All records of a step have the same length.
        dropped: records left over because they do not fill a batch; others in every epoch.
    """

    records: NDArray[np.int64]
    dropped: int


def plan_order(manifest: Manifest, global_batch: int, seed: int, epoch: int, *, shuffle: bool = True) -> Order:
    """Which records each step of an epoch takes."""
    random = np.random.default_rng([seed, epoch])
    batches, dropped = [], 0
    for numbers in _records_by_width(manifest):
        order = random.permutation(numbers) if shuffle else numbers
        steps = len(order) // global_batch
        dropped += len(order) - steps * global_batch
        batches.append(order[: steps * global_batch].reshape(steps, global_batch))
    records = np.concatenate(batches)
    if shuffle and len(batches) > 1:
        records = records[random.permutation(len(records))]
    return Order(records, dropped)


def _records_by_width(manifest: Manifest) -> list[NDArray[np.int64]]:
    """Numbers of the records of each length, in the order in which MindDataset counts through the sets."""
    numbers: dict[str, list[NDArray[np.int64]]] = {}
    first = 0
    for entry in manifest.sets:
        for width, count in entry.records_by_width.items():
            numbers.setdefault(width, []).append(np.arange(first, first + count))
            first += count
    return [np.concatenate(parts) for _, parts in sorted(numbers.items(), key=lambda item: int(item[0]))]


def load_dataset(
    path: str | Path,
    batch_size: int,
    seq_length: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    *,
    shuffle: bool = True,
    num_workers: int = 2,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    eos_token_ids: Collection[int] | None = None,
    pad_token_id: int | None = None,
) -> Any:
    """The batches of one epoch for one data-parallel rank.

    Args:
        path: the --output_file of llama31-data preprocess.
        batch_size: records a step for this rank; a step takes `batch_size * dp_size` in all.
        seq_length: of the model; records have one token more.
        start_step: counted from the beginning of training. The dataset begins there and ends with the epoch that this
            step is in; `start_step + dataset.get_dataset_size()` is where the next one begins.
        shuffle: another order in each epoch, or the order in the files.
        num_workers: threads that read.
        vocab_size, bos_token_id, eos_token_ids, pad_token_id: of the model, each checked if given.

    Returns:
        `mindspore.dataset.Dataset` with the manifest's columns, int32, (batch_size, record length).

    Raises:
        DataError: no complete output, one made for another model or length, or fewer records than one step takes.
    """
    output = Path(path)
    manifest = load_manifest(output)
    check_manifest(
        output,
        manifest,
        seq_length=seq_length,
        vocab_size=vocab_size,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
    )
    check_files(output, manifest, hashes=False)
    if batch_size < 1 or not 0 <= dp_rank < dp_size or start_step < 0:
        raise DataError(
            f"batch_size is {batch_size}, dp_rank {dp_rank} of {dp_size}, start_step {start_step}; expected a batch "
            "of at least 1, a rank from 0 to dp_size - 1 and a step from 0"
        )
    steps = len(plan_order(manifest, batch_size * dp_size, seed, 0).records)
    if not steps:
        raise DataError(
            f"{output}: has {manifest.num_records} records, a step takes {batch_size} x {dp_size} of one length; use a "
            "smaller batch, or more data"
        )
    epoch, done = divmod(start_step, steps)
    order = plan_order(manifest, batch_size * dp_size, seed, epoch, shuffle=shuffle).records[done:]
    mine = order[:, dp_rank * batch_size : (dp_rank + 1) * batch_size]

    import mindspore.dataset as ds

    dataset = ds.MindDataset(
        [str(output.parent / name) for entry in manifest.sets for name in entry.files],
        list(manifest.columns),
        num_parallel_workers=num_workers,
        sampler=ds.SubsetSampler(mine.ravel().tolist()),
    )
    return dataset.batch(batch_size, drop_remainder=True)


def check_manifest(
    output: Path,
    manifest: Manifest,
    *,
    seq_length: int,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    eos_token_ids: Collection[int] | None = None,
    pad_token_id: int | None = None,
) -> None:
    """Checks that data was made for a model.

    Raises:
        DataError: naming the first thing that differs, with both values.
    """
    pairs = [
        ("seq_length", manifest.seq_length, seq_length),
        ("vocab_size", manifest.vocab_size, vocab_size),
        ("bos_token_id", manifest.bos_token_id, bos_token_id),
        ("pad_token_id", manifest.pad_token_id, pad_token_id),
    ]
    for name, found, wanted in pairs:
        if wanted is not None and found != wanted:
            raise DataError(
                f"{output}: was made with {name} {found}, the model has {wanted}; preprocess for this model"
            )
    if eos_token_ids is not None and manifest.eos_token_id not in eos_token_ids:
        wanted_ids = ", ".join(map(str, sorted(eos_token_ids)))
        raise DataError(
            f"{output}: was made with eos_token_id {manifest.eos_token_id}, the model has {wanted_ids}; preprocess for "
            "this model"
        )
