"""Alpaca to conversations."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path

import pytest

from llama31_data import DataError, convert_alpaca
from llama31_data.manifest import write_atomically
from llama31_data.sample import SAMPLE_PATH

# Word for word from Stanford Alpaca's train.py, independently of the package's constants.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:"
)
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Response:"
)


def old_converter(records: list[dict[str, str]]) -> str:
    """What MindFormers' alpaca_converter.py writes for these records."""
    return json.dumps(
        [
            {
                "id": str(number),
                "conversations": [
                    {
                        "from": "human",
                        "value": WITH_INPUT % (record["instruction"], record["input"])
                        if record.get("input")
                        else NO_INPUT % record["instruction"],
                    },
                    {"from": "gpt", "value": record["output"]},
                ],
            }
            for number, record in enumerate(records, start=1)
        ],
        ensure_ascii=False,
        indent=2,
    )


def test_the_output_is_the_old_script_s_byte_for_byte(tmp_path: Path, sample_records: list[dict[str, str]]) -> None:
    report = convert_alpaca(str(SAMPLE_PATH), str(tmp_path / "out.json"))
    assert report.written == 40
    assert report.rejects == []
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == old_converter(sample_records)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_json_lines_and_gzip_give_the_same_as_an_array(tmp_path: Path, sample_records: list[dict[str, str]]) -> None:
    with gzip.open(tmp_path / "in.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in sample_records)
    convert_alpaca(str(tmp_path / "in.jsonl.gz"), str(tmp_path / "out.json"))
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == old_converter(sample_records)


def test_braces_in_a_record_are_text(tmp_path: Path) -> None:
    record = {"instruction": "Fill {instruction} in {0}", "input": "{input} {", "output": "}"}
    (tmp_path / "in.json").write_text(json.dumps([record]))
    convert_alpaca(str(tmp_path / "in.json"), str(tmp_path / "out.json"))
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == old_converter([record])


def test_bad_records_are_listed_with_line_and_reason_and_the_rest_is_written(tmp_path: Path) -> None:
    lines = ['[\n{"instruction": "a", "output": "b"},', '{"instruction": "a"},', '{"messages": []},']
    lines.append('{"instruction": "a", "input": null, "output": "c"},\n{"instruction": "\\ud800", "output": ""}]')
    (tmp_path / "in.json").write_text("\n".join(lines))
    report = convert_alpaca(str(tmp_path / "in.json"), str(tmp_path / "out.json"))
    assert report.written == 2
    assert [entry["id"] for entry in json.loads((tmp_path / "out.json").read_text())] == ["1", "4"]
    rejects = [json.loads(line) for line in (tmp_path / "out.json.rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (3, "field 'output' is missing, expected text"),
        (4, "looks like schema 'messages', expected 'alpaca'"),
        (6, "text has an unpaired surrogate, which is not a character"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a", "output": "b"}, {"instruction": 1}]', "in.json:1: field 'instruction' is a number"),
        ('[{"instruction": "a", "output": "b"},\n\n{"instruction" "a"}]', "in.json:3: not JSON: Expecting ':'"),
        ('[{"instruction": "a", "output": "b"}', "in.json:1: not JSON: ends early"),
        ("[]", "none of 0 records"),
        ("", "is empty"),
    ],
)
def test_an_error_leaves_no_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(DataError, match=r"in\.json") as caught:
        convert_alpaca(str(tmp_path / "in.json"), str(tmp_path / "out.json"), strict=True)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_an_existing_output_stays_unless_overwrite_is_given(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(DataError, match=r"out\.json: exists; give --overwrite"):
        convert_alpaca(str(SAMPLE_PATH), str(tmp_path / "out.json"))
    assert (tmp_path / "out.json").read_text() == "mine"
    convert_alpaca(str(SAMPLE_PATH), str(tmp_path / "out.json"), overwrite=True)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 40


def test_a_read_only_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a disk refuses to remove even a file that is not there."""
    source = tmp_path / "in.json"
    source.write_text('[{"instruction": "a", "input": "", "output": "b"}]')

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(DataError, match=r"x\.json: cannot be written: Read-only file system"):
        write_atomically(tmp_path / "x.json", "{}")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "unlink", refuse)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: "):
        convert_alpaca(str(source), str(tmp_path / "file" / "out.json"))
