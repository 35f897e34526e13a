"""Files to raw records: every format and compression gives the same, and memory does not grow with the file."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama31_data import json_stream
from llama31_data.chunks import MAX_BYTES, MAX_RECORDS, Chunk, iter_chunks
from llama31_data.encode import parse_payload
from llama31_data.errors import DataError
from llama31_data.json_stream import iter_array
from llama31_data.sources import Source, find_sources

RECORDS: list[dict[str, Any]] = [
    {"instruction": f"Frage {number} «ü»", "output": "答え\n" * number} for number in range(30)
]


def write(path: Path) -> Path:
    """RECORDS in the format and compression that the name says."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    array = json.dumps(RECORDS, indent=3).encode()
    if ".parquet" in path.suffixes:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines if ".jsonl" in path.suffixes else array))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        data = lines if ".jsonl" in path.suffixes else array
        halves = [zstandard.compress(part) for part in (data[:1000], data[1000:])]
        path.write_bytes(b"".join(halves))  # two frames, as pzstd writes
    else:
        path.write_bytes(lines if path.suffix == ".jsonl" or path.stem == "lines" else array)
    return path


def records_of(path: Path) -> list[Any]:
    (source,) = find_sources(str(path), plain_text=False)
    return [parse_payload(payload) for chunk in iter_chunks(0, source) for payload in chunk.payloads]


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.jsonl", "lines.json", "a.json.gz", "a.jsonl.gz", "a.json.zst", "a.jsonl.zst", "a.parquet", "A.JSON"],
)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    assert records_of(write(tmp_path / name)) == RECORDS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert records_of(path) == RECORDS


def test_globs_give_each_file_once_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.jsonl", "d [1].json"):
        write(tmp_path / name)
    patterns = [str(tmp_path / "*.json"), str(tmp_path / "?.json*"), str(tmp_path / "d [1].json")]
    names = [source.path.name for source in find_sources(patterns, plain_text=False)]
    assert names == ["a.json", "b.json", "d [1].json", "c.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty, expected a JSON array of records or JSON Lines"),
        ("a.json.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], "cannot be read: Compressed file ended"),
        ("a.jsonl.zst", b"no zstd", "is not a zstd file, or is damaged"),
        ("a.parquet", b"no parquet", "is not a Parquet file, or is damaged"),
        ("a.json", b'[{"a": "\xff"}]', "is not UTF-8 text"),
        ("a.json", b'[{"a": 1}, {"b": ]', "a.json:1: not JSON: Expecting value"),
        ("a.json", b'[{"a": 1}] []', "a.json:1: not JSON: text after the end of the array"),
        ("a.json", b"[" * 5000, "a.json:1: not JSON: "),
        ("a.json", b"[1" + b"0" * 5000 + b"]", "a.json:1: not JSON: Exceeds the limit"),
    ],
)
def test_damaged_files_are_one_error_with_the_path(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if path.suffix in (".zst", ".parquet"):
        pytest.importorskip("zstandard" if path.suffix == ".zst" else "pyarrow")
    with pytest.raises(DataError) as caught:
        records_of(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_directory_and_nothing_at_all_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory, give a file or a glob"):
        find_sources(str(tmp_path), plain_text=False)
    with pytest.raises(DataError, match="no such file, and as a glob no match"):
        find_sources(str(tmp_path / "*.json"), plain_text=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=8), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_an_array_streams_as_json_reads_it(values: list[Any], block: int, indent: int | None, ascii_only: bool) -> None:
    """With blocks so small that every element is cut somewhere."""
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_BLOCK_CHARS", block)
        elements = list(iter_array(io.StringIO(text), "x"))
    assert [element.value for element in elements] == values
    assert [json.loads(element.text) for element in elements] == values
    for element in elements:
        first = element.text.split("\n")[0]
        assert first in text.split("\n")[element.line - 1]


def test_a_mistake_in_an_array_is_found_without_reading_on(tmp_path: Path) -> None:
    stream = io.StringIO('[{"a": 1}, {"a" 1}, ' + '{"a": 1}, ' * 2_000_000)
    with pytest.raises(DataError, match="x:1: not JSON: Expecting ':' delimiter"):
        list(iter_array(stream, "x"))
    assert stream.tell() <= 2 * json_stream._BLOCK_CHARS


def chunks_of_lines(tmp_path: Path, lines: Iterator[bytes]) -> list[Chunk]:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.writelines(lines)
    return list(iter_chunks(7, Source(path, "lines", None)))


def test_chunks_are_bounded_by_records_and_by_bytes(tmp_path: Path) -> None:
    small = chunks_of_lines(tmp_path, (b'{"n": %d}\n\n' % number for number in range(2500)))
    assert [len(chunk.lines) for chunk in small] == [MAX_RECORDS, MAX_RECORDS, 2500 - 2 * MAX_RECORDS]
    assert [tuple(chunk.id) for chunk in small] == [(7, 0), (7, 1), (7, 2)]
    assert small[1].lines[0] == 2 * MAX_RECORDS + 1
    large = chunks_of_lines(tmp_path, (b'"' + b"x" * 400_000 + b'"\n' for _ in range(5)))
    assert [len(chunk.lines) for chunk in large] == [3, 2]
    assert 2 * 400_002 < MAX_BYTES <= 3 * 400_002


def test_a_digest_changes_with_any_record_and_with_where_records_part(tmp_path: Path) -> None:
    digests = {
        chunks_of_lines(tmp_path, iter(lines))[0].digest
        for lines in ([b"1\n", b"23\n"], [b"12\n", b"3\n"], [b"1\n", b"24\n"], [b"123\n"])
    }
    assert len(digests) == 4


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for count in (60_000, 300_000):
        path = tmp_path / f"{count}{suffix}"
        with path.open("w") as file:
            separator = ",\n" if suffix == ".json" else "\n"
            file.write("[\n" if suffix == ".json" else "")
            file.writelines(f'{{"text": "some words number {n}"}}{separator}' for n in range(count))
            file.write('{"text": ""}' + ("]" if suffix == ".json" else ""))
        (source,) = find_sources(str(path), plain_text=False)
        tracemalloc.start()
        assert sum(len(chunk.lines) for chunk in iter_chunks(0, source)) == count + 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
