"""Batches: every record once an epoch, over any number of ranks, the same from any step on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llama31_data import DataError, load_dataset, load_manifest
from llama31_data.loader import plan_order


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: str) -> Any:
    """1,100 records in two sets of two files, each known by the number it answers."""
    import json

    from llama31_data import PreprocessOptions, preprocess

    path = tmp_path_factory.mktemp("numbered")
    records = [{"instruction": "n", "output": str(number)} for number in range(1100)]
    (path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = path / "x.mindrecord"
    preprocess(PreprocessOptions((str(path / "in.jsonl"),), tokenizer_file, str(output), seq_length=64, shards=2,
                                 file_partition=2))  # fmt: skip
    return output


def batches(output: Any, **options: Any) -> list[list[tuple[int, ...]]]:
    """The trained tokens of each record of each batch."""
    dataset = load_dataset(output, **{"seq_length": 64, **options})
    assert dataset.get_dataset_size() > 0
    read = dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
    return [[answer(labels) for labels in batch["labels"]] for batch in read]


def answer(labels: NDArray[np.int32]) -> tuple[int, ...]:
    return tuple(labels[labels != -100][:-1].tolist())


def test_an_epoch_is_every_record_once_over_all_ranks(numbered: Any) -> None:
    ranks = [batches(numbered, batch_size=5, dp_rank=rank, dp_size=4) for rank in range(4)]
    seen = [record for rank in ranks for batch in rank for record in batch]
    assert len(seen) == len(set(seen)) == 1100
    assert {len(rank) for rank in ranks} == {55}


def test_a_step_takes_the_same_records_for_any_number_of_ranks(numbered: Any) -> None:
    alone = batches(numbered, batch_size=20, seed=7)
    ranks = [batches(numbered, batch_size=10, dp_rank=rank, dp_size=2, seed=7) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone


def test_it_goes_on_exactly_where_a_step_begins_in_any_epoch(numbered: Any) -> None:
    first = batches(numbered, batch_size=16, seed=3)
    second = batches(numbered, batch_size=16, seed=3, start_step=len(first))
    assert len(first) == len(second) == 68
    assert first != second
    assert batches(numbered, batch_size=16, seed=3, start_step=50) == first[50:]
    assert batches(numbered, batch_size=16, seed=3, start_step=68 + 50, num_workers=1) == second[50:]


def test_the_seed_decides_the_order_and_without_shuffle_it_is_the_files(numbered: Any) -> None:
    assert batches(numbered, batch_size=50, seed=1) == batches(numbered, batch_size=50, seed=1)
    assert batches(numbered, batch_size=50, seed=1) != batches(numbered, batch_size=50, seed=2)
    in_order = [record for batch in batches(numbered, batch_size=50, shuffle=False) for record in batch]
    import mindspore.dataset as ds

    manifest = load_manifest(numbered)
    stored = []
    for entry in manifest.sets:
        reader = ds.MindDataset(str(numbered.parent / entry.files[0]), ["labels"], shuffle=False)
        stored += [answer(row["labels"]) for row in reader.create_dict_iterator(num_epochs=1, output_numpy=True)]
    assert in_order == stored


def test_records_left_over_are_others_in_each_epoch(numbered: Any) -> None:
    manifest = load_manifest(numbered)
    orders = [plan_order(manifest, 64, 0, epoch) for epoch in range(3)]
    assert [order.dropped for order in orders] == [12, 12, 12]
    used = [set(order.records.ravel().tolist()) for order in orders]
    assert len(used[0] | used[1] | used[2]) == 1100


def test_buckets_give_batches_of_one_length_each(lab: Any) -> None:
    records = [{"instruction": "n" * (8 * number), "output": str(number)} for number in range(200)]
    lab.run(input_glob=(lab.jsonl(records),), seq_length=512, buckets=(64, 128, 512))
    dataset = load_dataset(lab.output, batch_size=8, seq_length=512, seed=1)
    shapes = [batch["input_ids"].shape for batch in dataset.create_dict_iterator(num_epochs=1, output_numpy=True)]
    assert len(shapes) == dataset.get_dataset_size()
    assert {length for _, length in shapes} == {65, 129, 513}
    assert {size for size, _ in shapes} == {8}
    assert [length for _, length in shapes] != sorted(length for _, length in shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": 512}, "was made with seq_length 64, the model has 512"),
        ({"vocab_size": 49152}, "was made with vocab_size 128256, the model has 49152"),
        ({"pad_token_id": 128002}, "was made with pad_token_id 128004, the model has 128002"),
        ({"bos_token_id": 1}, "was made with bos_token_id 128000, the model has 1"),
        ({"eos_token_ids": (2, 3)}, "was made with eos_token_id 128001, the model has 2, 3"),
        ({"batch_size": 2000}, "has 1100 records, a step takes 2000 x 1 of one length"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank 2 of 2"),
    ],
)
def test_data_for_another_model_is_refused_before_the_first_batch(
    numbered: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(numbered, **{"batch_size": 4, "seq_length": 64, **options})
    assert message in str(caught.value)


def test_data_for_this_model_is_taken(numbered: Any) -> None:
    load_dataset(
        numbered, 4, 64, vocab_size=128256, bos_token_id=128000, eos_token_ids=(128001, 128008), pad_token_id=128004
    )


def test_an_output_that_is_not_whole_is_refused(lab: Any) -> None:
    lab.run()
    data = lab.output.read_bytes()
    lab.output.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"has \d+ bytes, the manifest says \d+"):
        load_dataset(lab.output, 1, 256)
    lab.output.unlink()
    with pytest.raises(DataError, match="is missing; the manifest lists it"):
        load_dataset(lab.output, 1, 256)
