"""Our `.ckpt` reading and writing against MindSpore's own, and files that are damaged."""

from __future__ import annotations

import contextlib
from pathlib import Path

import mindspore
import ml_dtypes
import numpy as np
import pytest
from mindspore.train import serialization

from llama31_core.checkpoint import ckpt_format, stored, writer
from llama31_core.checkpoint.dtypes import DTYPES, Array
from llama31_core.checkpoint.reader import open_weights
from llama31_core.checkpoint.writer import save_weights
from llama31_core.errors import CheckpointError

RNG = np.random.default_rng(7)
TENSORS: dict[str, Array] = {
    "a.weight": RNG.standard_normal((33, 17)).astype(np.float32),
    "b.weight": RNG.standard_normal((5, 3, 2)).astype(ml_dtypes.bfloat16),
    "c.weight": RNG.standard_normal(9).astype(np.float16),
    "d": np.array(3, np.int32),
}


def _save_with_mindspore(path: Path, **options: bool) -> None:
    parameters = [{"name": name, "data": mindspore.Tensor(array)} for name, array in TENSORS.items()]
    mindspore.save_checkpoint(parameters, str(path), **options)


def _assert_same(found: Array, expected: Array) -> None:
    assert (found.dtype.name, found.shape) == (expected.dtype.name, expected.shape)
    np.testing.assert_array_equal(found.reshape(-1).view(np.uint8), expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("crc_check", [False, True])
def test_what_mindspore_writes_we_read(crc_check: bool, tmp_path: Path) -> None:
    _save_with_mindspore(tmp_path / "m.ckpt", crc_check=crc_check)
    with open_weights(tmp_path / "m.ckpt") as reader:
        assert set(reader.names()) == set(TENSORS)
        for name, array in TENSORS.items():
            _assert_same(reader.read(name), array)
    assert ckpt_format.check_crc(stored.OpenFile(tmp_path / "m.ckpt")) is (True if crc_check else None)


def test_tensors_that_mindspore_cuts_in_pieces_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KB: half a GB otherwise
    _save_with_mindspore(tmp_path / "m.ckpt")
    file = stored.OpenFile(tmp_path / "m.ckpt")
    assert len(ckpt_format.parse_ckpt(file)["a.weight"].segments) == 3
    with open_weights(tmp_path / "m.ckpt") as reader:
        _assert_same(reader.read("a.weight"), TENSORS["a.weight"])
        part = (slice(4, 29), slice(3, 11))
        _assert_same(reader.read_slice("a.weight", part), np.ascontiguousarray(TENSORS["a.weight"][part]))


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 256])
def test_what_we_write_mindspore_reads(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    save_weights(tmp_path / "o.ckpt", TENSORS.items())
    found = mindspore.load_checkpoint(str(tmp_path / "o.ckpt"))
    assert set(found) == set(TENSORS)
    for name, array in TENSORS.items():
        _assert_same(np.asarray(found[name].asnumpy()), array)


def test_arrays_of_mindspore_s_own_bfloat16_are_saved(tmp_path: Path) -> None:
    array = mindspore.Tensor(TENSORS["b.weight"]).asnumpy()
    assert array.dtype != np.dtype(ml_dtypes.bfloat16)
    save_weights(tmp_path / "o.safetensors", [("b.weight", array)])
    with open_weights(tmp_path / "o.safetensors") as reader:
        _assert_same(reader.read("b.weight"), TENSORS["b.weight"])


def test_safetensors_go_both_ways_with_mindspore(tmp_path: Path) -> None:
    save_weights(tmp_path / "o.safetensors", TENSORS.items())
    found = mindspore.load_checkpoint(str(tmp_path / "o.safetensors"), format="safetensors")
    parameters = [{"name": name, "data": mindspore.Tensor(array)} for name, array in TENSORS.items()]
    mindspore.save_checkpoint(parameters, str(tmp_path / "m.safetensors"), format="safetensors")
    with open_weights(tmp_path / "m.safetensors") as reader:
        for name, array in TENSORS.items():
            _assert_same(np.asarray(found[name].asnumpy()), array)
            _assert_same(reader.read(name), array)


def test_names_of_types_are_mindspore_s() -> None:
    assert {dtype.mindspore for dtype in DTYPES} <= set(serialization.tensor_to_ms_type)


def test_every_truncation_is_an_error_or_ends_between_tensors(tmp_path: Path) -> None:
    save_weights(tmp_path / "whole.ckpt", [("a", np.ones(3, np.float32)), ("b", np.ones((2, 2), np.float16))])
    content = (tmp_path / "whole.ckpt").read_bytes()
    whole_messages = []
    for size in range(len(content)):
        path = tmp_path / "part.ckpt"
        path.write_bytes(content[:size])
        with contextlib.suppress(CheckpointError):
            whole_messages.append(open_weights(path).names())
    assert whole_messages == [("a",)]  # protobuf cannot tell a file that ends between two values from a whole one


def test_a_changed_byte_fails_the_crc(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    _save_with_mindspore(path, crc_check=True)
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    assert ckpt_format.check_crc(stored.OpenFile(path)) is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "longer than 10 bytes"),
        (b"\x0a\xff\xff\xff\xff\x07abc", "announced where 3 are left"),
        (b"\x0a\x03\x0a\x01a", "lacks its tag, type or content"),
        (b"\x12\x03\x0a\x01a", "no value field begins"),
        (b"\x0a\x05\x0a\x01a\x1a\x00", "MapParameter"),
        (b"\x0a\x05\x0a\x01a\x22\x00", "unknown field with key 34"),
        (ckpt_format.build_value_start("a", DTYPES[0], (3,), 4) + b"1234", "has 4 bytes of content, expected 12"),
        ((ckpt_format.build_value_start("a", DTYPES[0], (1,), 4) + b"1234").replace(b"Float32", b"Float99"), "Float99"),
        (ckpt_format.build_value_start("a", DTYPES[0], (2**50,), 4) + b"1234", "impossible dims"),
        (
            b"".join(ckpt_format.build_value_start(name, DTYPES[0], (1,), 4) + b"1234" for name in "aba"),
            "'a' is there twice",
        ),
        (
            b"".join(ckpt_format.build_value_start("a", DTYPES[0], shape, 4) + b"1234" for shape in [(1,), (2,)]),
            "different dims",
        ),
    ],
)
def test_a_damaged_file_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path / "bad.ckpt")
