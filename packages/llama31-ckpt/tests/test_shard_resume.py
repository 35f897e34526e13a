"""`shard --resume`: ranks that are on disk stay, a changed source or wish starts anew, nothing is visible meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama31_ckpt import distribute
from llama31_ckpt.cli import main
from llama31_core.checkpoint import save_weights, spell
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig

MESH = ("--tp", "2", "--pp", "2")


def shard(source: Path, destination: Path, *words: str) -> int:
    return main(["shard", "--input_path", str(source), "--output_path", str(destination), *words])


def fail_after(count: int) -> Callable[..., Any]:
    real = distribute.write_rank
    done: list[None] = []

    def write(*arguments: Any) -> Any:
        if len(done) == count:
            raise OSError(28, "No space left on device")
        done.append(None)
        return real(*arguments)

    return write


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def interrupt(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Fail after two of four ranks; the modification times of what is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(distribute, "write_rank", fail_after(2))
        assert shard(hf_dir, tmp_path / "out", *MESH, "--resume") == 1
    assert not (tmp_path / "out").exists()
    part = tmp_path / ".out.part"
    times = {path.relative_to(part): path.stat().st_mtime_ns for path in part.rglob("*.safetensors")}
    assert len(times) == 2
    return times


def test_finished_ranks_are_kept(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard(hf_dir, tmp_path / "expected", *MESH) == 0
    times = interrupt(hf_dir, tmp_path, monkeypatch)
    (tmp_path / ".out.part" / "rank_3").mkdir(exist_ok=True)
    (tmp_path / ".out.part" / "rank_3" / "checkpoint_3.safetensors").write_bytes(b"half")
    assert shard(hf_dir, tmp_path / "out", *MESH, "--resume") == 0
    assert {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in times} == times
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not (tmp_path / ".out.part").exists()


@pytest.mark.parametrize("change", ["source", "mesh"])
def test_other_wishes_start_anew(
    change: str,
    hf_dir: Path,
    config: ModelConfig,
    tensors: dict[str, Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(hf_dir, tmp_path, monkeypatch)
    mesh: tuple[str, ...] = MESH
    if change == "source":
        changed = ((spell(name, "hf"), (array + 1).astype(np.float32)) for name, array in tensors.items())
        save_weights(hf_dir, changed, overwrite=True)
    else:
        mesh = ("--tp", "2")
    assert shard(hf_dir, tmp_path / "out", *mesh, "--resume") == 0
    assert shard(hf_dir, tmp_path / "expected", *mesh) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_without_resume_a_failure_keeps_nothing(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr(distribute, "write_rank", fail_after(2))
    assert shard(hf_dir, tmp_path / "out", *MESH) == 1
    assert contents(tmp_path) == before
