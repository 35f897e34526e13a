"""Writing: casts, shards, manifests, and that a failed or refused write leaves nothing behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama31_core.checkpoint import (
    cast,
    describe_file,
    dtype_of,
    hashed_file,
    open_weights,
    save_weights,
    staged_directory,
    staged_file,
    write_manifest,
    writer,
)
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.manifest import manifest_problems, read_manifest
from llama31_core.checkpoint.writer import TensorSpec, plan_shards
from llama31_core.errors import CheckpointError


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("word", ["fp8", "float", "", "BF16"])
def test_a_wrong_dtype_word_names_the_allowed_ones(word: str) -> None:
    with pytest.raises(CheckpointError, match="allowed are fp32, bf16, fp16"):
        dtype_of(word)


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_no_number() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -np.inf, np.nan, 1e-40], np.float32)
    got = cast(values, dtype_of("bf16"), tensor="x").astype(np.float32)
    np.testing.assert_array_equal(got[:4], np.array([1.0, 1.0, 1.015625, -np.inf], np.float32))
    assert np.isnan(got[4])
    assert 0 < got[5] < 2e-40


@pytest.mark.parametrize("word", ["fp32", "bf16", "fp16"])
def test_every_bfloat16_survives_a_wider_type(word: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    every = every[np.abs(every.astype(np.float32)) < (60000 if word == "fp16" else np.inf)]
    wide = cast(every, dtype_of(word), tensor="x")
    if word == "fp16":  # 10 mantissa bits hold bfloat16's 7 wherever the exponent is in range
        wide, every = wide[np.abs(wide) > 1e-4], every[np.abs(every.astype(np.float32)) > 1e-4]
    np.testing.assert_array_equal(wide.astype(np.float32), every.astype(np.float32))


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    array = np.array([1.0, 7e4, -1e6, np.inf], np.float32)
    with pytest.raises(CheckpointError, match="'x' has 2 finite values beyond the range of float16"):
        save_weights(tmp_path / "a.ckpt", [("x", array)], dtype="fp16")
    assert _files(tmp_path) == []


def test_shards_hold_their_limit_and_keep_the_order() -> None:
    dtype = dtype_of("fp32")
    specs = [TensorSpec(name, (rows, 10), dtype) for name, rows in (("a", 3), ("b", 3), ("c", 50), ("d", 1), ("e", 9))]
    shards = plan_shards(specs, 400)
    assert [[spec.name for spec in shard] for shard in shards.values()] == [["a", "b"], ["c"], ["d", "e"]]
    assert list(shards) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(plan_shards(specs, None)) == ["model.safetensors"]


def test_a_name_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'x' is given twice"):
        save_weights(tmp_path, [("x", np.ones(1))] * 2)


def test_chunks_that_do_not_fill_a_tensor_are_an_error(tmp_path: Path) -> None:
    spec = TensorSpec("x", (3,), dtype_of("fp32"))
    with pytest.raises(CheckpointError, match="takes 12 bytes, got 8"):
        writer.write_safetensors(tmp_path / "a", [spec], lambda _: [np.ones(2, np.float32)])


def test_an_existing_file_stays_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_weights(path, [("x", np.ones(1, np.float32))])
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"exists; remove it, or choose another destination$"):
        save_weights(path, [("x", np.zeros(1, np.float32))])
    assert path.read_bytes() == before
    save_weights(path, [("x", np.zeros(1, np.float32))], overwrite=True)
    assert path.read_bytes() != before
    assert _files(tmp_path) == ["a.ckpt"]


@pytest.fixture
def _disk_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third write of every file meets a full disk."""
    real_write = os.pwrite

    def write(descriptor: int, data: Any, offset: int) -> int:
        if offset >= 2 * 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(hashed_file, "_BLOCK_BYTES", 4096)


@pytest.mark.usefixtures("_disk_fills_up")
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_disk_that_fills_up_leaves_nothing(name: str, tmp_path: Path) -> None:
    def arrays() -> Iterator[tuple[str, Array]]:
        yield from ((f"t{i}", np.ones((32, 32), np.float32)) for i in range(5))

    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        save_weights(tmp_path / "new" / name, arrays())
    assert _files(tmp_path) == []


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "model"

    def fill_half() -> None:
        with staged_directory(destination) as part:
            (part / "half").write_text("x")
            assert not destination.exists()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fill_half()
    assert _files(tmp_path) == []
    with staged_directory(destination) as part:
        (part / "whole").write_text("x")
    assert _files(tmp_path) == ["deep", "deep/model", "deep/model/whole"]


def test_replacing_a_directory_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    with staged_directory(destination) as part:
        (part / "config.json").write_text("x")
    with pytest.raises(CheckpointError, match="exists"), staged_directory(destination):
        pass
    with pytest.raises(RuntimeError), staged_directory(destination, overwrite=True):
        raise RuntimeError
    assert _files(destination) == ["config.json"]
    with staged_directory(destination, overwrite=True) as part:
        (part / "new").write_text("x")
    assert _files(tmp_path) == ["model", "model/new"]


def test_a_failed_replacement_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "model"
    destination.mkdir()
    (destination / "config.json").write_text("old")
    rename = Path.rename

    def refuse_part(path: Path, target: Path) -> Path:
        if path.name == ".model.part":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_part)
    with pytest.raises(CheckpointError, match="cannot be written"), staged_directory(destination, overwrite=True):
        pass
    assert (destination / "config.json").read_text() == "old"
    assert _files(tmp_path) == ["model", "model/config.json"]


def test_a_resumable_directory_keeps_its_beginnings(tmp_path: Path) -> None:
    def fill_half() -> None:
        with staged_directory(tmp_path / "model", resume=True) as part:
            (part / "first").write_text("x")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fill_half()
    with staged_directory(tmp_path / "model", resume=True) as part:
        assert _files(part) == ["first"]
    assert _files(tmp_path) == ["model", "model/first"]


def test_two_writers_of_one_destination_do_not_mix(tmp_path: Path) -> None:
    with staged_file(tmp_path / "a") as part:
        part.write_text("first")
        with pytest.raises(CheckpointError, match="another process"), staged_file(tmp_path / "a"):
            pass
    assert (tmp_path / "a").read_text() == "first"
    assert _files(tmp_path) == ["a"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"), staged_directory(tmp_path / "file" / "model"):
        pass


def test_the_manifest_tells_what_changed(tmp_path: Path) -> None:
    files = save_weights(tmp_path, [("x", np.ones((8, 8), np.float32))], max_shard_bytes=1000)
    (tmp_path / "config.json").write_text("{}")
    files.append(describe_file(tmp_path / "config.json"))
    path = write_manifest(tmp_path, files, dtype="float32", source={"format": "test"}, tool="test 1")
    content = read_manifest(path)
    assert (content["dtype"], content["tool"], content["source"]) == ("float32", "test 1", {"format": "test"})
    assert set(content["files"]) == {"model.safetensors", "config.json"}
    assert describe_file(tmp_path / "model.safetensors") == files[0]
    assert manifest_problems(path) == []
    (tmp_path / "config.json").write_text("{ }")
    (tmp_path / "model.safetensors").unlink()
    assert manifest_problems(path) == [
        "model.safetensors is missing",
        "config.json has another sha256 than the manifest says",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format_version": 2, "files": {}}', '{"format_version": 1, "files": {"../x": {"sha256": "a"}}}'],
)
def test_a_damaged_manifest_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path / "manifest.json")


def test_written_weights_can_be_read_at_once(tmp_path: Path) -> None:
    big = np.arange(3 * 1000, dtype=np.float32).reshape(3, 1000)
    save_weights(tmp_path, [("x", big)], dtype="bf16")
    with open_weights(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("x"), big.astype(ml_dtypes.bfloat16))
