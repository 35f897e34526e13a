"""Whole runs over the sample: records, manifest, rejects, and the places where a run has to stop."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from llama31_data import DataError, PreprocessOptions, load_manifest
from llama31_data.sample import SAMPLE_PATH
from llama31_tokenizer import ChatFormat, Tokenizer


def test_records_are_the_chat_format_with_labels_on_the_answers(
    lab: Any, llama3: Tokenizer, sample_records: list[dict[str, str]]
) -> None:
    manifest = lab.run()
    records = lab.records()
    assert len(records) == len(sample_records) == manifest.num_records
    for record, source in zip(records, sample_records, strict=True):
        ids, labels = record["input_ids"], record["labels"]
        assert ids.dtype == labels.dtype == np.int32
        assert ids.shape == labels.shape == (257,)
        answer = [*llama3.encode(source["output"]), llama3.special_tokens["<|eot_id|>"]]
        assert labels[labels != -100].tolist() == answer
        assert (ids[labels != -100] == labels[labels != -100]).all()
        used = int(np.flatnonzero(labels != -100)[-1]) + 1
        assert (ids[used:] == llama3.pad_id).all()
        assert ids[0] == llama3.bos_id
        assert source["instruction"] in llama3.decode(ids[:used].tolist())


def test_the_manifest_says_what_is_in_the_files(lab: Any, llama3: Tokenizer) -> None:
    manifest = lab.run()
    records = lab.records()
    labels = np.concatenate([record["labels"] for record in records])
    ids = np.concatenate([record["input_ids"] for record in records])
    assert manifest == load_manifest(lab.output)
    assert manifest.counts["read"] == manifest.counts["samples"] == manifest.counts["written"] == 40
    assert manifest.counts["label_tokens"] == (labels != -100).sum()
    assert manifest.counts["tokens"] == (ids != llama3.pad_id).sum()
    assert (manifest.vocab_size, manifest.seq_length) == (128256, 256)
    assert (manifest.bos_token_id, manifest.eos_token_id, manifest.pad_token_id) == (128000, 128001, 128004)
    assert manifest.tokenizer_sha256 == llama3.sha256
    assert sorted(path.name for path in lab.out.iterdir()) == [
        "data.mindrecord",
        "data.mindrecord.db",
        "data.mindrecord.manifest.json",
    ]
    for entry in manifest.files:
        assert hashlib.sha256((lab.out / entry.name).read_bytes()).hexdigest() == entry.sha256


def test_conversations_and_the_records_they_came_from_give_the_same(
    lab: Any, sample_records: list[dict[str, str]]
) -> None:
    from llama31_data import convert_alpaca

    convert_alpaca(str(SAMPLE_PATH), str(lab.path / "conversations.json"))
    lab.run(input_glob=(str(lab.path / "conversations.json"),))
    direct = lab.path / "direct" / lab.output.name
    lab.run(output_file=str(direct))
    assert lab.output.read_bytes() == direct.read_bytes()


def test_multi_turn_labels_every_answer(lab: Any, llama3: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    lab.run(input_glob=(lab.jsonl([{"messages": messages}]),))
    (record,) = lab.records()
    eot = llama3.special_tokens["<|eot_id|>"]
    assert record["labels"][record["labels"] != -100].tolist() == [*llama3.encode("1"), eot, *llama3.encode("2"), eot]
    dialog = ChatFormat(llama3).encode_dialog(messages)
    assert record["input_ids"][: len(dialog.ids)].tolist() == dialog.ids


def test_rejects_are_listed_and_counted(lab: Any) -> None:
    good = {"instruction": "a", "output": "b"}
    turns = [{"from": "gpt", "value": "unasked"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = lab.jsonl(
        [
            good,
            {"prompt": "a"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}]},
            {"conversations": turns},
            {"conversations": [{"from": "human", "value": "q"}]},
            {"text": "prose"},
            17,
        ],
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write("{'single': 'quotes'}\n")
    manifest = lab.run(input_glob=(path,))
    assert [(line, reason.split(":")[0]) for line, reason in lab.rejects()] == [
        (2, "no known schema"),
        (3, "turn 1 is from 'user', expected 'assistant'"),
        (5, "no assistant turn after a user turn"),
        (6, "is plain text, expected a conversation; use --dataset_type wiki for text"),
        (7, "is a number, expected an object with one of the known schemas"),
        (8, "not JSON"),
    ]
    counts = manifest.counts
    assert (counts["read"], counts["rejected"], counts["written"], counts["dropped_turns"]) == (8, 6, 2, 1)
    assert "data.mindrecord.rejects.jsonl" in [entry.name for entry in manifest.files]


def test_strict_stops_at_the_first_bad_record_and_leaves_nothing(lab: Any) -> None:
    path = lab.jsonl([{"instruction": "a", "output": "b"}, {"instruction": "a"}, {}])
    with pytest.raises(DataError, match=r"in\.jsonl:2: field 'output' is missing, expected text \(--strict\)"):
        lab.run(input_glob=(path,), strict=True)
    assert lab.snapshot() == {}


def test_answers_longer_than_the_sequence_are_cut_and_counted(lab: Any, llama3: Tokenizer) -> None:
    path = lab.jsonl(
        [
            {"instruction": "count", "output": " ".join(map(str, range(500)))},
            {"instruction": "word " * 400, "output": "never seen"},
            {"instruction": "short", "output": "yes"},
        ],
    )
    manifest = lab.run(input_glob=(path,), seq_length=100)
    records = lab.records()
    assert [len(record["input_ids"]) for record in records] == [101, 101]
    assert records[0]["labels"][-1] == records[0]["input_ids"][-1] != llama3.special_tokens["<|eot_id|>"]
    counts = manifest.counts
    assert (counts["truncated"], counts["rejected"], counts["written"]) == (1, 1, 2)
    ((line, reason),) = lab.rejects()
    assert line == 2
    assert "its first 101 tokens (seq_length + 1) have no answer in them" in reason


def test_split_long_keeps_every_token_that_is_trained_on(lab: Any, llama3: Tokenizer) -> None:
    answer = " ".join(map(str, range(500)))
    path = lab.jsonl([{"instruction": "count", "output": answer}])
    manifest = lab.run(input_glob=(path,), seq_length=100, split_long=True)
    records = lab.records()
    joined = np.concatenate([record["input_ids"] for record in records]).tolist()
    assert answer in llama3.decode(joined)
    assert (manifest.counts["split"], manifest.counts["samples"]) == (1, len(records))
    assert manifest.counts["dropped_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 4}, r"none of 40 records can be used at --seq_length 4, .*a larger --seq_length is needed"),
        ({"seq_length": 0}, r"--seq_length is 0, allowed are 1 to"),
        ({"schema": "sharegpt"}, r"instructions\.json:2: looks like schema 'alpaca', expected 'sharegpt'"),
        ({"dataset_type": "wiki"}, r"looks like schema 'alpaca', expected 'text'; use --dataset_type qa"),
        ({"template": "vicuna_v1.2"}, r"--template vicuna_v1\.2: unknown; nearest are vicuna_v1\.1"),
        ({"model_file": "/nowhere/tokenizer.model"}, r"--model_file: /nowhere/tokenizer\.model: cannot be read"),
        ({"input_glob": ("/nowhere/*.json",)}, r"--input_glob /nowhere/\*\.json: no such file"),
        ({"shards": 2}, r"--shards is 2, but the input has 1 chunks"),
        ({"pad_id": 200000}, r"--pad_id is 200000, allowed are 0 to 128255"),
        ({"packing": True, "buckets": ()}, r"--packing and --padding bucket exclude each other"),
        ({"output_file": "/tmp/a:b.mindrecord"}, r"MindRecord does not take a file name with :"),
    ],
)
def test_bad_options_and_input_are_one_error_and_leave_nothing(
    lab: Any, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        lab.run(**changes)
    assert "\n" not in str(caught.value)
    assert not (lab.out).exists() or lab.snapshot() == {}


def test_a_damaged_array_stops_the_run_and_leaves_nothing(lab: Any) -> None:
    (lab.path / "in.json").write_text('[{"instruction": "a", "output": "b"},\n{"instruction": ]')
    with pytest.raises(DataError, match=r"in\.json:2: not JSON"):
        lab.run(input_glob=(str(lab.path / "in.json"),))
    assert lab.snapshot() == {}


def test_an_existing_output_stays_unless_overwrite_is_given(lab: Any) -> None:
    lab.run()
    before = lab.snapshot()
    with pytest.raises(DataError, match=r"data\.mindrecord: exists; give --overwrite"):
        lab.run(seq_length=300)
    assert lab.snapshot() == before
    assert lab.run(seq_length=300, overwrite=True, file_partition=3).seq_length == 300
    names = {path.name for path in (lab.out).iterdir()}
    assert "data.mindrecord2.db" in names
    assert "data.mindrecord" not in names


def test_options_are_checked_when_they_are_made() -> None:
    with pytest.raises(DataError, match="--buckets is 64, 32"):
        PreprocessOptions(("a",), "m", "o", seq_length=32, buckets=(64, 32))
