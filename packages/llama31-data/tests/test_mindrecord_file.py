"""The bytes of a MindRecord set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llama31_data.errors import DataError, ResumableError
from llama31_data.layouts import Block
from llama31_data.mindrecord_file import check_name, write_set

COLUMNS = ("input_ids", "labels")


def blocks(num_records: int, block: int) -> Iterator[Block]:
    ids = np.random.default_rng(0).integers(0, 1000, (num_records, 17)).astype(np.int32)
    for first in range(0, num_records, block):
        yield dict.fromkeys(COLUMNS, ids[first : first + block])


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_equal_records_give_equal_bytes_wherever_and_however_they_are_written(tmp_path: Path) -> None:
    contents = []
    for name, block in (("a", 100), ("b", 7), ("c", 1)):
        (tmp_path / name).mkdir()
        written = write_set(tmp_path / name / "x.mindrecord", COLUMNS, blocks(100, block), width=17)
        assert (written.num_records, written.records_by_width) == (100, {17: 100})
        contents.append(content(tmp_path / name / "x.mindrecord"))
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0]) == {"x.mindrecord", "x.mindrecord.db"}


def test_a_set_of_files_is_the_one_filewriter_writes(tmp_path: Path) -> None:
    """FileWriter gives each file an equal, consecutive part of a batch, and at random only what is left over."""
    from mindspore.mindrecord import FileWriter

    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    (block,) = blocks(99, 99)
    in_turn = {name: np.concatenate(np.stack(np.split(block[name], 3), axis=1)) for name in COLUMNS}
    write_set(tmp_path / "ours" / "x.mindrecord", COLUMNS, [in_turn], num_files=3, width=17)
    writer = FileWriter(str(tmp_path / "theirs" / "x.mindrecord"), 3)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in COLUMNS}, "llama31")
    writer.set_page_size(4 << 20)
    writer.write_raw_data([dict(zip(COLUMNS, row, strict=True)) for row in zip(*block.values(), strict=True)])
    writer.commit()
    assert content(tmp_path / "ours" / "x") == content(tmp_path / "theirs" / "x")


@pytest.mark.parametrize("num_files", [1, 2, 3, 11])
def test_opening_one_file_of_a_set_reads_every_record(tmp_path: Path, num_files: int) -> None:
    import mindspore.dataset as ds

    written = write_set(tmp_path / "x.mindrecord", COLUMNS, blocks(100, 7), num_files, width=17)
    (expected,) = blocks(100, 100)
    for file in written.files:
        dataset = ds.MindDataset(str(file), list(COLUMNS), shuffle=False)
        read = [tuple(row["input_ids"]) for row in dataset.create_dict_iterator(num_epochs=1, output_numpy=True)]
        assert sorted(read) == sorted(map(tuple, expected["input_ids"]))


def test_files_are_as_readable_as_the_umask_lets_them_be(tmp_path: Path) -> None:
    written = write_set(tmp_path / "x.mindrecord", COLUMNS, blocks(1, 1), width=17)
    (tmp_path / "plain").touch()
    assert written.files[0].stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["a:b", "a b ", "a?b", "a&b"])
def test_names_that_mindrecord_refuses_are_refused_first(name: str) -> None:
    with pytest.raises(DataError, match=r"--output_file .*: MindRecord does not take a file name with"):
        check_name(Path("/tmp") / name)


def test_without_mindspore_there_is_one_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mindspore.mindrecord", None)  # what an import then raises: ModuleNotFoundError
    with pytest.raises(ResumableError, match=r"MindRecord is written with MindSpore .*; install it, run again"):
        write_set(tmp_path / "x.mindrecord", COLUMNS, blocks(1, 1), width=17)
    assert list(tmp_path.iterdir()) == []
