"""Damaged PyTorch files and the JSON beside them raise our error or read right: 500 damaged files, 200 odd JSONs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_ckpt.cli import main
from llama31_ckpt.torch_format import load_tensors
from llama31_core.config import ModelConfig
from llama31_core.errors import Llama31Error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

_DAMAGE = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=9), st.integers(0, 12)), min_size=1, max_size=3)
_FIXTURES_ARE_FILES = [HealthCheck.function_scoped_fixture]


def _damaged(content: bytes, damage: list[tuple[int, bytes, int]]) -> bytes:
    for position, patch, removed in damage:
        start = position % (len(content) + 1)
        content = content[:start] + patch + content[start + removed :]
    return content


def _try_to_load(path: Path) -> None:
    try:
        for tensor in load_tensors(path).values():
            assert isinstance(tensor, torch.Tensor)
    except Llama31Error as error:
        assert str(path) in str(error)  # noqa: PT017 - both outcomes are right


@given(damage=_DAMAGE)
@settings(max_examples=300, deadline=None, suppress_health_check=_FIXTURES_ARE_FILES)
def test_damaged_zip_archives(damage: list[tuple[int, bytes, int]], tmp_path: Path) -> None:
    valid = tmp_path / "valid.pth"
    if not valid.exists():
        torch.save({"norm.weight": torch.ones(6), "output.weight": torch.ones(3, 4)}, valid)
    (tmp_path / "bad.pth").write_bytes(_damaged(valid.read_bytes(), damage))
    _try_to_load(tmp_path / "bad.pth")


@given(damage=_DAMAGE)
@settings(max_examples=200, deadline=None, suppress_health_check=_FIXTURES_ARE_FILES)
def test_damaged_pickles_of_the_old_format(damage: list[tuple[int, bytes, int]], tmp_path: Path) -> None:
    valid = tmp_path / "valid.bin"
    if not valid.exists():
        torch.save({"norm.weight": torch.ones(6)}, valid, _use_new_zipfile_serialization=False)
    (tmp_path / "bad.bin").write_bytes(_damaged(valid.read_bytes(), damage))
    _try_to_load(tmp_path / "bad.bin")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(["dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta"]), value=_JSON)
@settings(max_examples=100, deadline=None, suppress_health_check=_FIXTURES_ARE_FILES)
def test_any_value_in_params_json(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "meta"
    path.mkdir(exist_ok=True)
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, key: value}
    (path / "params.json").write_text(json.dumps(params))
    tensors = {"tok_embeddings.weight": torch.ones(4, 8), "layers.0.feed_forward.w1.weight": torch.ones(6, 8)}
    torch.save(tensors, path / "consolidated.00.pth")
    assert main(["convert", "--input_path", str(path), "--output_path", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


@given(key=st.sampled_from(sorted(ModelConfig.preset("tiny").to_hf())), value=_JSON)
@settings(max_examples=100, deadline=None, suppress_health_check=_FIXTURES_ARE_FILES)
def test_any_value_in_config_json(key: str, value: object, hf_dir: Path, tmp_path: Path) -> None:
    config = {**ModelConfig.preset("tiny").to_hf(), key: value}
    (hf_dir / "config.json").write_text(json.dumps(config))
    assert main(["convert", "--input_path", str(hf_dir), "--output_path", str(tmp_path / "out")]) in (0, 1)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
