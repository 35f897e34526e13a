"""Training data that is damaged or was made for something else: one sentence each."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore.mindrecord import FileWriter

from llama31_core.config import ModelConfig
from llama31_core.errors import DatasetError
from llama31_core.training.batch import Batch
from llama31_core.training.dataset import MindRecordDataset, find_records
from llama31_core.training.label_watch import LabelWatch

CONFIG = ModelConfig.preset("tiny")
GOOD = {"seq_length": 8, "vocab_size": 512, "bos_token_id": None, "eos_token_id": None}


def write(path: Path, manifest: object = GOOD, **columns: list[list[int]]) -> Path:
    writer = FileWriter(str(path))
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in columns})
    for row in zip(*columns.values(), strict=True):
        writer.write_raw_data([{name: np.array(v, np.int32) for name, v in zip(columns, row, strict=True)}])
    writer.commit()
    path.with_name(path.name + ".manifest.json").write_text(json.dumps(manifest))
    return path


def write_two(path: Path, ids: list[int], labels: list[int] | None = None, manifest: object = GOOD) -> Path:
    return write(path, manifest, input_ids=[ids] * 2, labels=[labels or ids] * 2)


def open_data(path: Path, batch_size: int = 2, seed: int | None = None, **more: Any) -> MindRecordDataset:
    return MindRecordDataset(path, CONFIG, seq_length=8, batch_size=batch_size, seed=seed, num_workers=1, **more)


def read(path: Path) -> Batch:
    return next(open_data(path).batches())


def test_labels_stand_one_place_further_on(tmp_path: Path) -> None:
    rows = [list(range(start, start + 9)) for start in (0, 100)]
    masked = [[-100] * 4 + row[4:] for row in rows]
    batch = read(write(tmp_path / "a.mindrecord", input_ids=rows, labels=masked))
    np.testing.assert_array_equal(batch.tokens, np.array(rows)[:, :-1])
    np.testing.assert_array_equal(batch.labels, np.array(masked)[:, 1:])
    np.testing.assert_array_equal(batch.positions, [list(range(8))] * 2)


def test_packed_records_keep_documents_apart(tmp_path: Path) -> None:
    rows = [[11, 12, 13, 14, 21, 22, 23, 0, 0]] * 2
    segments, positions = [[1, 1, 1, 1, 2, 2, 2, 0, 0]] * 2, [[0, 1, 2, 3, 0, 1, 2, 0, 0]] * 2
    columns = {"input_ids": rows, "labels": rows, "segment_ids": segments, "position_ids": positions}
    batch = read(write(tmp_path / "a.mindrecord", GOOD | {"columns": list(columns)}, **columns))
    np.testing.assert_array_equal(batch.labels[0], [12, 13, 14, -100, 22, 23, -100, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], segments[0][:-1])
    np.testing.assert_array_equal(batch.positions[0], positions[0][:-1])


def test_the_order_is_the_same_from_any_batch_on_and_over_any_ranks(tmp_path: Path) -> None:
    rows = [[i] * 9 for i in range(10)]
    path = write(tmp_path / "a.mindrecord", input_ids=rows, labels=rows)
    whole = list(islice((b.tokens[:, 0].tolist() for b in open_data(path, 2, seed=3).batches()), 12))
    assert sorted(number for batch in whole[:5] for number in batch) == list(range(10))
    assert whole[:5] != whole[5:10]  # another order in the next epoch
    for start in (3, 5, 8):
        later = (b.tokens[:, 0].tolist() for b in open_data(path, 2, seed=3).batches(start))
        assert list(islice(later, 4)) == whole[start : start + 4]
    halves = [open_data(path, 1, seed=3, rank=rank, num_ranks=2).batches() for rank in range(2)]
    for want in whole[:7]:
        assert [next(half).tokens[0, 0] for half in halves] == want
    first = next(open_data(path, 2, seed=3).batches())
    assert list(first.record_numbers) == whole[0]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_record_comes_once_whatever_the_batch(num_ranks: int, tmp_path: Path) -> None:
    rows = [[i] * 9 for i in range(7)]
    path = write(tmp_path / "a.mindrecord", input_ids=rows, labels=rows)
    seen = []
    for rank in range(num_ranks):
        batches = list(open_data(path, 1, seed=3, rank=rank, num_ranks=num_ranks).every_record(3))
        assert len({batch.tokens.shape for batch in batches}) == 1
        seen += [row[0] for batch in batches for row in batch.labels if (row != -100).all()]
        assert all((batch.labels == batch.tokens)[batch.labels != -100].all() for batch in batches)
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(
    ("ids", "labels"),
    [([512] * 9, [1] * 9), ([-1] * 9, [1] * 9), ([1] * 9, [512] * 9), ([1] * 9, [-5] * 9)],
)
def test_ids_outside_the_vocabulary_are_refused(ids: list[int], labels: list[int], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="outside the vocabulary of 512"):
        read(write_two(tmp_path / "a.mindrecord", ids, labels))


def test_records_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected 9 of each; set model\.model_config\.seq_length to 4"):
        read(write_two(tmp_path / "a.mindrecord", [1] * 5))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ([], "no manifest of llama31-data"),
        ({"seq_length": 8, "vocab_size": "x"}, "no manifest of llama31-data"),
        (GOOD | {"seq_length": 9}, "seq_length 9, the run 8"),
        (GOOD | {"vocab_size": 600}, "600 tokens, the model 512"),
        (GOOD | {"counts": {"label_tokens": 0}}, "no token of the data is trained on"),
        (GOOD | {"columns": ["input_ids", "labels", "scores"]}, "the records have input_ids, labels, scores"),
    ],
)
def test_data_made_for_something_else_is_refused(manifest: object, message: str, tmp_path: Path) -> None:
    path = write_two(tmp_path / "a.mindrecord", [1] * 9, manifest=manifest)
    with pytest.raises(DatasetError, match=message):
        read(path)


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    for name, used in (("same", digest), ("other", "0" * 64)):
        path = write_two(tmp_path / f"{name}.mindrecord", [1] * 9, manifest=GOOD | {"tokenizer_sha256": used})
        if name == "same":
            open_data(path, tokenizer_dir=tmp_path)
            continue
        with pytest.raises(DatasetError, match=r"has sha256 000000000000…, .*tokenizer.json is .*--model_file"):
            open_data(path, tokenizer_dir=tmp_path)


def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_two(tmp_path / "a.mindrecord", [1] * 9)
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
    path = write_two(tmp_path / "a.mindrecord", [1] * 9)
    batches = open_data(path, batch_size=1).batches()
    next(batches)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_without_any_label_ends_with_its_first_pass_over_the_data() -> None:
    watch = LabelWatch("data", patience=2)
    watch.see(1, 0)
    with pytest.raises(DatasetError, match="data: no token of the records of 2 steps is trained on"):
        watch.see(2, 0)
    some = LabelWatch("data", patience=2)
    for step, labels in enumerate((0, 5, 0, 0, 0)):
        some.see(step, labels)
