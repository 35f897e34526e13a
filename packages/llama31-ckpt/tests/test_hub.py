"""`org/name` in place of a path: what the Hub's library would give, and each way in which it cannot."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from llama31_ckpt.cli import main


def _convert(name: str, tmp_path: Path) -> int:
    return main(["convert", "--input_path", name, "--output_path", str(tmp_path / "out")])


def test_a_repository_is_converted_like_its_directory(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        directory = tmp_path / "cache" / "snapshot"
        directory.mkdir(parents=True)
        for file in hf_dir.iterdir():  # links, as in the library's cache
            if any(file.match(pattern) for pattern in allow_patterns):
                (directory / file.name).symlink_to(file)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert _convert("some-org/Llama-3.1", tmp_path) == 0
    assert asked == ["some-org/Llama-3.1"]
    assert main(["diff", str(hf_dir), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (hf_dir / "tokenizer_config.json").read_bytes()


def test_a_directory_comes_first(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(hf_dir, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert _convert("org/name", tmp_path) == 0


def _offline(name: str, **options: Any) -> str:
    raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more lines")


@pytest.mark.parametrize(
    ("name", "library", "message"),
    [
        ("org/name", _offline, "org/name does not exist, and the Hugging Face Hub did not give a repository"),
        ("org/name", lambda name, **_: "/nonexistent", "of the Hugging Face Hub has no safetensors"),
        ("org/name", None, "pip install 'llama31-ckpt[hub]'"),
        ("../name", _offline, "error: ../name does not exist\n"),
        ("a/b/c", _offline, "error: a/b/c does not exist\n"),
    ],
)
def test_what_the_hub_does_not_have(
    name: str,
    library: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if library is None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    else:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", library)
    assert _convert(name, tmp_path) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.glob("out*")) == []
