"""An output's records in, its samples out: what was padded or packed is taken apart again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama31_data.layouts import IGNORED
from llama31_data.manifest import Manifest

Columns = dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in a record: `trained[i]` says whether token i is a target."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


def read_records(output: Path, manifest: Manifest, numbers: Sequence[int] | None = None) -> Iterator[Columns]:
    """Records by their numbers, or all in order."""
    import mindspore.dataset as ds

    dataset = ds.MindDataset(
        [str(output.parent / name) for entry in manifest.sets for name in entry.files],
        list(manifest.columns),
        **({"shuffle": False} if numbers is None else {"sampler": ds.SubsetSampler(list(numbers))}),
    )
    yield from dataset.create_dict_iterator(num_epochs=1, output_numpy=True)


def samples_of(record: Columns, pad_id: int) -> list[Sample]:
    """The samples of a record, without padding."""
    ids, trained = record["input_ids"], record["labels"] != IGNORED
    if "segment_ids" in record:
        segments = record["segment_ids"]
        used = int((segments > 0).sum())
        cuts = np.flatnonzero(np.diff(segments[:used])) + 1
    else:
        written = np.flatnonzero(trained | (ids != pad_id))
        used = int(written[-1]) + 1 if len(written) else 0
        cuts = np.array([], np.int64)
    parts = zip(np.split(ids[:used], cuts), np.split(trained[:used], cuts), strict=True)
    return [Sample(part_ids, part_trained) for part_ids, part_trained in parts]
