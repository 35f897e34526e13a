"""Our safetensors reading and writing against the library of the format's authors, and headers that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llama31_core.checkpoint.reader import open_weights
from llama31_core.checkpoint.writer import save_weights
from llama31_core.errors import CheckpointError

ARRAYS = npst.arrays(
    st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_]),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


@given(tensors=st.dictionaries(st.text('abc.é"\\', min_size=1, max_size=8), ARRAYS, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_what_we_write_the_library_reads_and_the_other_way_round(
    tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("s")
    save_weights(directory / "ours.safetensors", tensors.items())
    theirs = safetensors.numpy.load_file(directory / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    safetensors.numpy.save_file(tensors, directory / "theirs.safetensors")
    with open_weights(directory / "theirs.safetensors") as reader:
        for name, array in tensors.items():
            for got in (theirs[name], reader.read(name)):
                assert got.dtype == array.dtype
                np.testing.assert_array_equal(got, array)


def test_bfloat16_bits_and_metadata_are_the_library_s(tmp_path: Path) -> None:
    array = np.arange(-40, 40, dtype=np.float32).reshape(8, 10).astype(ml_dtypes.bfloat16)
    save_weights(tmp_path / "a.safetensors", [("x", array)])
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "ms"}
        np.testing.assert_array_equal(file.get_tensor("x").view(np.uint16), array.view(np.uint16))


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_slice_is_numpy_s_slice_and_reads_no_other_byte(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = data.draw(npst.array_shapes(min_dims=1, max_dims=3, max_side=7))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    path = tmp_path_factory.mktemp("s") / "a.safetensors"
    save_weights(path, [("x", array)])
    bounds = st.integers(-9, 9) | st.none()
    index = tuple(data.draw(st.builds(slice, bounds, bounds)) for _ in range(data.draw(st.integers(0, len(shape)))))
    with open_weights(path) as reader:
        np.testing.assert_array_equal(reader.read_slice("x", index), array[index])
        assert reader.bytes_read == array[index].nbytes


def _entry(begin: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape if not isinstance(shape, tuple) else list(shape),
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{}" * 9, b"", "not valid JSON"),
        (b"[1,2,3,4]", b"", "not valid JSON|JSON list"),
        (b'{"a":1}', b"", "must have dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", "is there twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        ({"a": _entry(0, 4)}, b"", "truncated or its header lies"),
        ({"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456", "overlaps"),
        ({"a": _entry(0, 4), "b": _entry(8, 12)}, b"1" * 12, "gap of 4 bytes"),
        ({"a": _entry(0, 4)}, b"123456", "2 bytes after the last tensor"),
        ({"a": _entry(4, 0)}, b"1234", "takes 4 bytes"),
        ({"a": _entry(0, 4, shape=(2,))}, b"1234", "takes 8 bytes"),
        ({"a": _entry(0, 4, shape=(-1,))}, b"1234", "expected a list of sizes"),
        ({"a": _entry(0, 0, shape=(0, 2**40, 2**40))}, b"", "expected a list of sizes"),
        ({"a": _entry(0, 4, shape="ab")}, b"1234", "expected a list of sizes"),
        ({"a": _entry(0, 4, dtype="F33")}, b"1234", "allowed are F32"),
        ({"a": _entry(0, 4, dtype=["F32"])}, b"1234", "allowed are F32"),
        ({"a": _entry(0, 2**70)}, b"1234", "data_offsets"),
        ({"__metadata__": {"a": 1}, "a": _entry(0, 4)}, b"1234", "strings to strings"),
        ({"__metadata__": {}}, b"", "holds no weights"),
    ],
)
def test_a_header_that_lies_is_an_error(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError, match=message) as error:
        open_weights(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", b"\x10" + b"\0" * 7]
)
def test_a_header_length_that_lies_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, [("x", np.ones((10, 10), np.float32))])
    with open_weights(path) as reader:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="truncated"):
            reader.read("x")
