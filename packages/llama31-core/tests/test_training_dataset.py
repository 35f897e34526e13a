"""Training data that is damaged or was made for something else: one sentence each."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from mindspore.mindrecord import FileWriter

from llama31_core.config import ModelConfig
from llama31_core.errors import DatasetError
from llama31_core.training.dataset import MindRecordDataset, find_records

CONFIG = ModelConfig.preset("tiny")
GOOD = {"seq_length": 8, "vocab_size": 512, "bos_token_id": None, "eos_token_id": None}


def write(path: Path, ids: list[list[int]], labels: list[list[int]], manifest: object = GOOD) -> Path:
    writer = FileWriter(str(path))
    row = {"type": "int32", "shape": [-1]}
    writer.add_schema({"input_ids": row, "labels": row})
    for row_ids, row_labels in zip(ids, labels, strict=True):
        writer.write_raw_data([{"input_ids": np.array(row_ids, np.int32), "labels": np.array(row_labels, np.int32)}])
    writer.commit()
    path.with_name(path.name + ".manifest.json").write_text(json.dumps(manifest))
    return path


def read(path: Path, batch_size: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:  # type: ignore[type-arg]
    dataset = MindRecordDataset(path, CONFIG, seq_length=8, batch_size=batch_size, seed=None, num_workers=1)
    return list(dataset.epochs(1))


def test_labels_stand_one_place_further_on(tmp_path: Path) -> None:
    rows = [list(range(start, start + 9)) for start in (0, 100)]
    masked = [[-100] * 4 + row[4:] for row in rows]
    [(tokens, labels)] = read(write(tmp_path / "a.mindrecord", rows, masked))
    np.testing.assert_array_equal(tokens, np.array(rows)[:, :-1])
    np.testing.assert_array_equal(labels, np.array(masked)[:, 1:])


@pytest.mark.parametrize(
    ("ids", "labels"),
    [([512] * 9, [1] * 9), ([-1] * 9, [1] * 9), ([1] * 9, [512] * 9), ([1] * 9, [-5] * 9)],
)
def test_ids_outside_the_vocabulary_are_refused(ids: list[int], labels: list[int], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="outside the vocabulary of 512"):
        read(write(tmp_path / "a.mindrecord", [ids] * 2, [labels] * 2))


def test_records_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected 9 of each; set model\.model_config\.seq_length to 4"):
        read(write(tmp_path / "a.mindrecord", [[1] * 5] * 2, [[1] * 5] * 2))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ([], "no manifest of llama31-data"),
        ({"seq_length": 8, "vocab_size": "x"}, "no manifest of llama31-data"),
        (GOOD | {"seq_length": 9}, "seq_length 9, the run 8"),
        (GOOD | {"vocab_size": 600}, "600 tokens, the model 512"),
        (GOOD | {"columns": ["input_ids", "labels", "segment_ids", "position_ids"]}, "records are packed"),
    ],
)
def test_data_made_for_something_else_is_refused(manifest: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mindrecord", [[1] * 9] * 2, [[1] * 9] * 2, manifest)
    with pytest.raises(DatasetError, match=message):
        read(path)


def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mindrecord", [[1] * 9] * 2, [[1] * 9] * 2)
    os.truncate(path, 100)
    with pytest.raises(DatasetError, match=r"a\.mindrecord cannot be read") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_only_the_named_file_and_its_numbered_parts_are_taken(tmp_path: Path) -> None:
    for name in ("train.mindrecord", "b[1].mindrecord0", "b[1].mindrecord1", "b[1].mindrecord_old"):
        (tmp_path / name).touch()
        (tmp_path / f"{name}.db").touch()
    assert [path.name for path in find_records(tmp_path / "b[1].mindrecord")] == [
        "b[1].mindrecord0",
        "b[1].mindrecord1",
    ]
    assert len(find_records(tmp_path)) == 4
    for name in ("tr", "train", "none"):
        with pytest.raises(DatasetError, match="holds no MindRecord file"):
            find_records(tmp_path / name)


def test_reading_leaves_the_handlers_of_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    path = write(tmp_path / "a.mindrecord", [[1] * 9] * 2, [[1] * 9] * 2)
    dataset = MindRecordDataset(path, CONFIG, seq_length=8, batch_size=1, seed=None, num_workers=1)
    batches = dataset.epochs(1)
    next(batches)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
