"""`inspect`, `verify` and `diff`, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from llama31_ckpt.cli import main
from llama31_core.checkpoint import save_weights
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig

Tensors = dict[str, Array]


@pytest.fixture
def model_dir(hf_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    assert main(["convert", "--input_path", str(hf_dir), "--output_path", str(path)]) == 0
    return path


def _json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_lists_what_is_there(
    hf_dir: Path, config: ModelConfig, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = _json_of(capsys, "inspect", hf_dir)
    assert code == 0
    assert (report["format"], report["model"]) == ("safetensors", "tiny or a model of its shape")
    assert report["num_parameters"] == config.num_parameters
    assert report["dtypes"] == {"float32": config.num_parameters}
    assert report["size_bytes"] == 4 * config.num_parameters
    assert ModelConfig.from_hf(report["config"]) == config
    assert {entry["name"]: entry["shape"] for entry in report["tensors"]} == {
        name: list(array.shape) for name, array in tensors.items()
    }
    stored = {entry["name"]: entry["stored_name"] for entry in report["tensors"]}
    assert stored["model.layers.1.attention.wk.weight"] == "model.layers.1.self_attn.k_proj.weight"
    assert main(["inspect", str(hf_dir), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "tiny or a model of its shape" in text
    assert "model.layers.1.self_attn.k_proj.weight" in text


def test_inspect_needs_no_config_and_no_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(tmp_path / "a.ckpt", [("lm_head.weight", np.ones((4, 3), np.float32)), ("step", np.ones(1, np.int8))])
    code, report = _json_of(capsys, "inspect", tmp_path / "a.ckpt")
    assert (code, report["config"], report["model"]) == (0, None, "not a whole Llama model")
    assert report["size_bytes"] == 4 * 12 + 1


def test_a_converted_model_verifies(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = _json_of(capsys, "verify", model_dir)
    assert (code, report["problems"], report["unchecked"]) == (0, [], [])


def test_verify_says_what_is_wrong(
    model_dir: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.attention.wv.weight"
    tensors[name][3, :5] = np.nan
    tensors[name][4, 1] = -np.inf
    tensors["model.norm_out.weight"] = np.ones(65, np.float32)
    save_weights(model_dir, tensors.items(), overwrite=True)
    code, report = _json_of(capsys, "verify", model_dir)
    assert code == 1
    sha, shape, values = report["problems"]
    assert sha == "model.safetensors has another sha256 than the manifest says"
    assert "model.norm_out.weight is (65,), expected (64,)" in shape
    assert values == f"{name} has 5 NaN and 1 Inf"
    save_weights(tmp_path / "lone.ckpt", tensors.items())
    assert main(["verify", str(tmp_path / "lone.ckpt")]) == 1
    output = capsys.readouterr()
    assert f"problem: {name} has 5 NaN and 1 Inf" in output.out
    assert output.err.count("note: no ") == 2


@pytest.mark.parametrize("target", ["m.ckpt", "m.safetensors", "m"])
def test_the_same_weights_in_two_formats_do_not_differ(target: str, hf_dir: Path, tmp_path: Path) -> None:
    assert main(["convert", "--input_path", str(hf_dir), "--output_path", str(tmp_path / target), "--qkv_concat"]) == 0
    assert main(["diff", str(hf_dir), str(tmp_path / target)]) == 0


def test_diff_finds_the_one_element(
    hf_dir: Path, model_dir: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.feed_forward.w2.weight"
    expected = abs(float(tensors[name][9, 9]) - 5.0)
    tensors[name][9, 9] = 5.0
    del tensors["lm_head.weight"]
    tensors["extra"] = np.ones(2, np.float32)
    save_weights(model_dir, tensors.items(), overwrite=True)
    code, report = _json_of(capsys, "diff", hf_dir, model_dir)
    assert (code, report["same"]) == (1, False)
    assert (report["only_in_a"], report["only_in_b"]) == (["lm_head.weight"], ["extra"])
    differing = [entry for entry in report["tensors"] if entry["num_differing"]]
    assert [(entry["name"], entry["num_differing"]) for entry in differing] == [(name, 1)]
    assert differing[0]["max_difference"] == pytest.approx(expected, rel=1e-6)
    assert main(["diff", str(hf_dir), str(model_dir)]) == 1
    text = capsys.readouterr().out
    assert "only in a: lm_head.weight" in text
    assert name in text
    assert "not the same within 0" in text


def test_diff_counts_rounding_within_a_tolerance(build_gguf: Callable[..., Path], hf_dir: Path) -> None:
    half = build_gguf(GGMLQuantizationType.F16, name="half.gguf")
    assert main(["diff", str(hf_dir), str(half)]) == 1
    assert main(["diff", str(hf_dir), str(half), "--tolerance", "0.01"]) == 0


def test_nan_equals_nan_and_nothing_else(
    hf_dir: Path, model_dir: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors["model.norm_out.weight"][:2] = np.nan
    save_weights(model_dir, tensors.items(), overwrite=True)
    code, report = _json_of(capsys, "diff", hf_dir, model_dir, "--tolerance", "1e9")
    entry = next(entry for entry in report["tensors"] if entry["name"] == "model.norm_out.weight")
    assert (code, entry["max_difference"], entry["num_differing"]) == (1, None, 2)
    assert main(["diff", str(model_dir), str(model_dir)]) == 0
