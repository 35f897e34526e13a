"""Conversions between the formats: bit-exact there and back, and nothing left behind when refused or cut off."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama31_ckpt.cli import main
from llama31_ckpt.resume import RECORD_NAME
from llama31_ckpt.sizes import parse_size
from llama31_core.checkpoint import open_weights, save_weights, spell, writer
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.manifest import manifest_problems, read_manifest
from llama31_core.config import ModelConfig

Tensors = dict[str, Array]


def _convert(source: Path, destination: Path, *options: str) -> int:
    return main(["convert", "--input_path", str(source), "--output_path", str(destination), *options])


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _assert_holds(path: Path, tensors: Tensors, dtype: Any = np.float32) -> None:
    with open_weights(path) as reader:
        assert set(reader.names()) == set(tensors)
        for name, array in tensors.items():
            got = reader.read(name)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, array.astype(dtype))


@pytest.mark.parametrize("target", ["model", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize(("word", "dtype"), [(None, np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_hf_to_mindspore(
    target: str, word: str | None, dtype: Any, hf_dir: Path, tensors: Tensors, config: ModelConfig, tmp_path: Path
) -> None:
    out = tmp_path / target
    assert _convert(hf_dir, out, *(["--dtype", word] if word else [])) == 0
    _assert_holds(out, tensors, dtype)
    manifest = out / "manifest.json" if out.is_dir() else tmp_path / f"{target}.manifest.json"
    content = read_manifest(manifest)
    assert (content["dtype"], content["source"]["format"]) == (np.dtype(dtype).name, "safetensors")
    assert content["tool"].startswith("llama31-ckpt ")
    assert manifest_problems(manifest) == []
    if out.is_dir():
        assert ModelConfig.from_pretrained(out) == config
        assert (out / "tokenizer_config.json").read_bytes() == (hf_dir / "tokenizer_config.json").read_bytes()
        assert set(_files(out)) == {"config.json", "manifest.json", "model.safetensors", "tokenizer_config.json"}


def test_there_and_back_every_byte_is_the_same(hf_dir: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, list[str]]] = [
        ("hf_again", ["--reversed"]),
        ("model", []),
        ("fused.ckpt", ["--qkv_concat"]),
        ("plain.ckpt", ["--config", str(hf_dir)]),
        ("sharded", ["--max_shard_size", "100KB"]),
        ("hf_back", ["--reversed"]),
    ]
    source = hf_dir
    for name, options in steps:
        assert _convert(source, tmp_path / name, *options) == 0
        source = tmp_path / name
    assert _files(tmp_path / "hf_again")["model.safetensors"] == _files(source)["model.safetensors"]
    first, last = open_weights(hf_dir), open_weights(source)
    for name in first.names():
        assert first.read(name).tobytes() == last.read(name).tobytes()
    assert last.stored_name("model.norm_out.weight") == "model.norm.weight"


def test_fused_output_is_what_mindformers_stacks(hf_dir: Path, tensors: Tensors, tmp_path: Path) -> None:
    assert _convert(hf_dir, tmp_path / "f.safetensors", "--qkv_concat") == 0
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "f.safetensors")
    layer = "model.layers.1."
    qkv = np.concatenate([tensors[f"{layer}attention.{w}.weight"] for w in ("wq", "wk", "wv")])
    gate = np.concatenate([tensors[f"{layer}feed_forward.{w}.weight"] for w in ("w1", "w3")])
    np.testing.assert_array_equal(stored[f"{layer}attention.w_qkv.weight"], qkv)
    np.testing.assert_array_equal(stored[f"{layer}feed_forward.w_gate_hidden.weight"], gate)
    assert f"{layer}attention.wq.weight" not in stored


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 1 << 20])
def test_the_chunk_size_does_not_change_a_byte(
    chunk_bytes: int, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _convert(hf_dir, tmp_path / "expected", "--dtype", "bf16") == 0
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    assert _convert(hf_dir, tmp_path / "got", "--dtype", "bf16") == 0
    assert _files(tmp_path / "got")["model.safetensors"] == _files(tmp_path / "expected")["model.safetensors"]


def test_gguf_to_a_model_directory(build_gguf: Callable[..., Path], tensors: Tensors, tmp_path: Path) -> None:
    assert _convert(build_gguf(), tmp_path / "model", "--dtype", "fp32") == 0
    _assert_holds(tmp_path / "model", tensors)
    assert read_manifest(tmp_path / "model" / "manifest.json")["source"] == {"format": "gguf", "name": "tiny.gguf"}


def test_a_tied_head_is_left_out_if_it_is_the_embedding(
    hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert _convert(hf_dir, tmp_path / "model") == 1
    assert "lm_head.weight differs from it; set tie_word_embeddings to false" in capsys.readouterr().err
    with open_weights(hf_dir) as reader:
        tensors = {spell(name, "hf"): reader.read(name) for name in reader.names()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_weights(hf_dir, tensors.items(), overwrite=True)
    assert _convert(hf_dir, tmp_path / "model") == 0
    assert "lm_head.weight equals the tied embedding" in capsys.readouterr().err
    with open_weights(tmp_path / "model") as reader:
        assert "lm_head.weight" not in reader.names()


def _break_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("break_source", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json beside the weights; give one with --config"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: os.truncate(d / "model.safetensors", 5000), "is truncated"),
        (lambda d: os.truncate(d / "model.safetensors", 0), "model.safetensors is empty"),
        (lambda d: _break_config(d, num_hidden_layers=3), "9 missing (model.layers.2"),
        (lambda d: _break_config(d, num_hidden_layers=1), "9 unexpected (model.layers.1"),
        (lambda d: _break_config(d, intermediate_size=161), "6 misshapen (model.layers.0.feed_forward.w1"),
        (lambda d: _break_config(d, attention_bias=True), "attention_bias is True"),
        (lambda d: _break_config(d, hiden_act="silu"), "unknown key 'hiden_act'; did you mean 'hidden_act'"),
    ],
)
def test_bad_sources_are_refused_in_one_sentence(
    break_source: Callable[[Path], object],
    message: str,
    hf_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_source(hf_dir)
    before = _files(tmp_path)
    assert _convert(hf_dir, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("llama31-ckpt: error: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "destination", "options", "message"),
    [
        ("absent", "out", (), "absent does not exist"),
        ("hf", "out", ("--dtype", "fp8"), "dtype 'fp8' is not known: allowed are fp32, bf16, fp16"),
        ("hf", "hf/out", (), "lie in each other"),
        ("hf", "hf", ("--overwrite",), "lie in each other"),
        ("hf", ".", ("--overwrite",), "lie in each other"),
        ("hf", "taken", (), "taken exists; remove it, or choose another destination, or give --overwrite"),
        ("hf", "taken", ("--overwrite",), "taken is no checkpoint and is not replaced"),
        ("hf", "taken/file", ("--overwrite",), "is a file, expected a directory"),
        ("hf", "/proc/x/y", (), "/proc/x/y cannot be written: No such file or directory"),
        ("hf", "taken/file/out", (), "cannot be written"),
        ("hf", "out.ckpt", ("--reversed",), "drop --qkv_concat or the .ckpt suffix"),
        ("hf", "out.ckpt", ("--resume",), "is one file"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(
    source: str,
    destination: str,
    options: tuple[str, ...],
    message: str,
    hf_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("keep me")
    before = _files(tmp_path)
    assert _convert(tmp_path / source, tmp_path / destination, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert _files(tmp_path) == before
    assert hf_dir.is_dir()


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["convert"], ["convert", "--input_path", "x"], ["convert", "--max_shard_size", "big"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "is not like 5GB" in capsys.readouterr().err
    assert [parse_size(text) for text in ("5GB", "1.5mb", "64KB", "1000")] == [5 * 10**9, 1_500_000, 64_000, 1000]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="does not exist"):
        main(["--debug", "convert", "--input_path", str(tmp_path / "x"), "--output_path", str(tmp_path / "y")])


def test_overwrite_replaces_a_directory(hf_dir: Path, tensors: Tensors, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _convert(hf_dir, out, "--max_shard_size", "100KB") == 0
    for damage in (lambda: None, (out / "config.json").unlink, lambda: (out / "manifest.json").write_text("{")):
        damage()
        assert _convert(hf_dir, out, "--overwrite") == 0
        _assert_holds(out, tensors)
        assert set(_files(out)) == {"config.json", "manifest.json", "model.safetensors", "tokenizer_config.json"}


@pytest.mark.parametrize("command", ["convert", "shard"])
@pytest.mark.parametrize("name", ["notes.txt", "thesis/chapter.tex", "other.safetensors", "rank_0/notes.txt"])
def test_overwrite_spares_what_is_not_of_the_checkpoint(
    command: str, name: str, hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "--input_path", str(hf_dir), "--output_path", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main([*arguments, "--overwrite"]) == 0
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("keep me")
    before = _files(tmp_path)
    assert main([*arguments, "--overwrite"]) == 1
    assert "which is not of the checkpoint there" in capsys.readouterr().err
    assert _files(tmp_path) == before


@pytest.mark.parametrize("destination", ["", ".", "..", "../here"])
def test_overwrite_spares_the_current_directory(
    destination: str, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert main(["convert", "--input_path", str(hf_dir), "--output_path", destination, "--overwrite"]) == 1
    assert "is the current directory or holds it" in capsys.readouterr().err
    assert here.is_dir()


def test_no_room_is_said_before_anything_is_written(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert _convert(hf_dir, tmp_path / "out") == 1
    assert "GB free; free space first" in capsys.readouterr().err


Write = Callable[..., Any]


def _failing_write(failure: BaseException, after: int) -> Write:
    """`write_safetensors` that fails in the middle of the shard after so many whole ones."""
    whole = writer.write_safetensors
    calls = 0

    def write(path: Path, specs: Any, chunks: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= after:
            return whole(path, specs, chunks, **options)
        path.write_bytes(b"half of a shard")
        raise failure

    return write


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("failure", "code"), [(FULL_DISK, 1), (KeyboardInterrupt(), 130)])
def test_a_conversion_cut_off_leaves_nothing(
    failure: BaseException, code: int, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _files(tmp_path)
    monkeypatch.setattr("llama31_ckpt.convert.write_safetensors", _failing_write(failure, after=1))
    assert _convert(hf_dir, tmp_path / "new" / "out", "--max_shard_size", "100KB") == code
    assert _files(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_clears_up(number: int, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(tmp_path)
    monkeypatch.setattr("llama31_ckpt.convert.write_index", lambda *_: os.kill(os.getpid(), number))
    handler = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    try:
        assert _convert(hf_dir, tmp_path / "out") == 130
    finally:
        signal.signal(number, handler)
    assert _files(tmp_path) == before


def test_resume_goes_on_after_the_finished_shards(
    hf_dir: Path, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max_shard_size", "100KB", "--resume")
    assert _convert(hf_dir, tmp_path / "expected", *options[:2]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("llama31_ckpt.convert.write_safetensors", _failing_write(FULL_DISK, after=3))
        assert _convert(hf_dir, tmp_path / "out", *options) == 1
    assert not (tmp_path / "out").exists()
    part = tmp_path / ".out.part"
    finished = list(json.loads((part / RECORD_NAME).read_text())["files"])
    assert len(finished) == 3
    times = {name: (part / name).stat().st_mtime_ns for name in finished}
    assert _convert(hf_dir, tmp_path / "out", *options) == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times
    assert _files(tmp_path / "out") == _files(tmp_path / "expected")
    assert not part.exists()


@pytest.mark.parametrize(("touched", "words"), [(True, ()), (False, ("--dtype", "bf16"))])
def test_resume_starts_anew_if_the_source_or_the_wishes_changed(
    touched: bool,
    words: tuple[str, ...],
    hf_dir: Path,
    tensors: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--max_shard_size", "100KB", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr("llama31_ckpt.convert.write_safetensors", _failing_write(FULL_DISK, after=2))
        assert _convert(hf_dir, tmp_path / "out", *options) == 1
    if touched:
        tensors = {name: array + 1 for name, array in tensors.items()}
        save_weights(hf_dir, ((spell(name, "hf"), array) for name, array in tensors.items()), overwrite=True)
    assert _convert(hf_dir, tmp_path / "out", *options, *words) == 0
    _assert_holds(tmp_path / "out", tensors, ml_dtypes.bfloat16 if words else np.float32)
