"""LoRA adapters: merged weights give the outputs of base plus adapter, and a difference comes back as an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama31_ckpt.cli import main
from llama31_ckpt.lora_extract import factor
from llama31_core.checkpoint import open_weights, save_weights, spell
from llama31_core.checkpoint.dtypes import Array
from llama31_core.lora.adapter import PREFIX

Tensors = dict[str, Array]
AdapterBuilder = Callable[..., Path]
CHANGED = (
    "model.layers.0.attention.wq.weight",
    "model.layers.1.attention.wk.weight",
    "model.layers.1.feed_forward.w2.weight",
)


@pytest.fixture
def build_adapter(tensors: Tensors, tmp_path: Path) -> AdapterBuilder:
    """Writes an adapter directory as PEFT's save_pretrained does."""

    def build(drop: str = "", extra: Tensors | None = None, **config: Any) -> Path:
        path = tmp_path / "adapter"
        path.mkdir(exist_ok=True)
        values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]}
        values |= {"bias": "none", "use_rslora": False, "modules_to_save": None, "inference_mode": True}
        (path / "adapter_config.json").write_text(json.dumps({**values, **config}))
        rng = np.random.default_rng(2)
        stored: Tensors = {}
        for name in CHANGED:
            rows, columns = tensors[name].shape
            module = "base_model.model." + spell(name, "hf").removesuffix(".weight")
            stored[f"{module}.lora_A.weight"] = rng.standard_normal((4, columns)).astype(np.float32)
            stored[f"{module}.lora_B.weight"] = rng.standard_normal((rows, 4)).astype(np.float32)
        stored = {name: array for name, array in stored.items() if name != drop} | (extra or {})
        save_weights(path / "adapter_model.safetensors", stored.items(), overwrite=True)
        return path

    return build


def _adapter_of(path: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = "base_model.model." + spell(name, "hf").removesuffix(".weight")
    with open_weights(path / "adapter_model.safetensors") as reader:
        return tuple(torch.from_numpy(reader.read(f"{module}.lora_{side}.weight")) for side in "AB")


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0, 4.0)),
        ({"alpha_pattern": {"q_proj": 4, "self_attn.k_proj": 12, "proj": 1}}, (1.0, 3.0, 2.0)),
    ],
)
def test_a_merged_layer_is_the_base_layer_plus_the_adapter(
    settings: dict[str, Any],
    scales: tuple[float, ...],
    hf_dir: Path,
    build_adapter: AdapterBuilder,
    tensors: Tensors,
    tmp_path: Path,
) -> None:
    adapter = build_adapter(**settings)
    command = [
        "convert",
        "--input_path",
        str(hf_dir),
        "--output_path",
        str(tmp_path / "merged"),
        "--lora",
        str(adapter),
    ]
    assert main(command) == 0
    with open_weights(tmp_path / "merged") as merged:
        for name, base in tensors.items():
            got = torch.from_numpy(merged.read(name))
            if name not in CHANGED:
                assert torch.equal(got, torch.from_numpy(base))
                continue
            a, b = _adapter_of(adapter, name)
            x = torch.randn(5, base.shape[1], generator=torch.Generator().manual_seed(1))
            scale = scales[CHANGED.index(name)]
            expected = x @ torch.from_numpy(base).T + scale * (x @ a.T) @ b.T
            torch.testing.assert_close(x @ got.T, expected, rtol=1e-4, atol=1e-3)


def test_merging_into_bfloat16_rounds_once(hf_dir: Path, build_adapter: AdapterBuilder, tmp_path: Path) -> None:
    half = tmp_path / "half"
    assert main(["convert", "--input_path", str(hf_dir), "--output_path", str(half), "--dtype", "bf16"]) == 0
    adapter = build_adapter()
    command = ["convert", "--input_path", str(half), "--output_path", str(tmp_path / "m"), "--lora", str(adapter)]
    assert main(command) == 0
    with open_weights(half) as base, open_weights(tmp_path / "m") as merged:
        for name in CHANGED:
            a, b = _adapter_of(adapter, name)
            expected = base.read(name).astype(np.float32) + np.float32(2.0) * (b @ a).numpy()
            error = np.abs(merged.read(name).astype(np.float32) - expected)
            assert merged.dtype(name) == "bfloat16"
            assert np.all(error <= np.abs(expected) * 2.0**-8 + 1e-5)  # half a unit in the last of 8 bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True, only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": "8"}, "is '8', expected a number"),
        ({"rank_pattern": {"q_proj": 8}}, "self_attn.q_proj has rank 4, adapter_config.json says 8"),
        ({"target_modules": ["q_proj", "k_proj"]}, "but there are matrices for model.layers.1.mlp.down_proj"),
        ({"drop": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"}, "just one of lora_A and lora_B"),
        ({"extra": {"base_model.model.model.norm.weight": np.ones(64, np.float32)}}, "is no LoRA matrix"),
        (
            {"extra": {f"{PREFIX}model.layers.0.x.lora_{s}.weight": np.ones((4, 4), np.float32) for s in "AB"}},
            "changes model.layers.0.x.weight, which no Llama model has",
        ),
        (
            {"target_modules": "lm_head|.*_proj",
             "extra": {f"{PREFIX}lm_head.lora_{s}.weight": np.ones((4, 4), np.float32) for s in "AB"}},
            "changes lm_head.weight as (4, 4)",
        ),
        (
            {"extra": {f"{PREFIX}lm_head.lora_A.weight": np.ones((4, 4), np.float32),
                       f"{PREFIX}lm_head.lora_B.weight": np.ones((4, 5), np.float32)}},
            "do not fit each other",
        ),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(
    changes: dict[str, Any],
    message: str,
    hf_dir: Path,
    build_adapter: AdapterBuilder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = build_adapter(**changes)
    command = ["convert", "--input_path", str(hf_dir), "--output_path", str(tmp_path / "out"), "--lora", str(adapter)]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_difference_comes_back_as_an_adapter(
    hf_dir: Path, build_adapter: AdapterBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    convert = ["convert", "--input_path", str(hf_dir)]
    assert main([*convert, "--output_path", str(tuned), "--lora", str(build_adapter())]) == 0
    extract = ["extract-lora", str(hf_dir), str(tuned), "--rank", "4", "--output_path", str(tmp_path / "extracted")]
    assert main(extract) == 0
    assert "3 matrices of rank 4" in capsys.readouterr().out
    config = json.loads((tmp_path / "extracted" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
    assert main([*convert, "--output_path", str(again), "--lora", str(tmp_path / "extracted")]) == 0
    assert main(["diff", str(tuned), str(again), "--tolerance", "1e-4"]) == 0
    assert main(extract) == 1
    assert "exists; remove it, or choose another destination, or give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("", "do not differ; there is nothing to extract"),
        ("lm_head.weight", "LoRA changes the matrices of layers only"),
        ("model.norm_out.weight", "LoRA changes the matrices of layers only"),
    ],
)
def test_differences_that_are_no_adapter_are_refused(
    changed: str, message: str, hf_dir: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = {name: array + 1 if name == changed else array for name, array in tensors.items()}
    save_weights(tmp_path / "tuned.ckpt", tuned.items())
    command = ["extract-lora", str(hf_dir), str(tmp_path / "tuned.ckpt"), "--output_path", str(tmp_path / "out")]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_factors_are_the_best_of_their_rank() -> None:
    rng = np.random.default_rng(5)
    matrix = (rng.standard_normal((60, 40)) @ np.diag(0.7 ** np.arange(40)) @ rng.standard_normal((40, 50))).astype(
        np.float32
    )
    b, a = factor(matrix, 10)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.sqrt((values[10:] ** 2).sum())  # Eckart and Young
    assert np.linalg.norm(matrix - b @ a) <= 1.01 * best
    b, a = factor(np.ones((6, 5), np.float32), 3)
    np.testing.assert_allclose(b @ a, 1.0, atol=1e-5)
    assert (b.shape, a.shape) == ((6, 3), (3, 5))
