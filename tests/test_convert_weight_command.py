"""MindFormers' `convert_weight.py` command line, as its guide spells it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from convert_weight import main

from llama31_core.checkpoint import open_weights, spell


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """An HF directory written by transformers itself."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    return tmp_path / "hf"


def test_the_guide_s_command_and_the_way_back(hf_dir: Path, tmp_path: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(hf_dir)
    command = ["--model", "llama", "--dtype", "bf16"]
    assert main([*command, "--input_path", str(hf_dir), "--output_path", str(tmp_path / "MS_CKPT_NAME")]) == 0
    with open_weights(tmp_path / "MS_CKPT_NAME.ckpt") as reader:
        for name in reader.names():
            bits = original.state_dict()[spell(name, "hf")].view(torch.int16).numpy()
            np.testing.assert_array_equal(reader.read(name), bits.view(ml_dtypes.bfloat16))
    back = tmp_path / "back"
    assert (
        main([*command, "--reversed", "--input_path", f"{tmp_path}/MS_CKPT_NAME.ckpt", "--output_path", str(back)]) == 0
    )
    reloaded, info = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values())
    assert reloaded.dtype == torch.bfloat16
    tokens = torch.arange(20)[None]
    assert torch.equal(reloaded(tokens).logits, original(tokens).logits)


def test_a_path_to_a_file_that_the_directory_does_not_have(hf_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", "llama", "--input_path", str(hf_dir / "hf.bin"), "--output_path", str(tmp_path / "m.ckpt")]
    assert main([*arguments, "--qkv_concat", "True"]) == 0
    with open_weights(tmp_path / "m.ckpt") as reader:
        assert reader.stored_name("model.layers.0.attention.wk.weight") == "model.layers.0.attention.w_qkv.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "glm"], "invalid choice: 'glm'"),
        (["--model", "llama", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--model", "llama", "--qkv_concat", "yes"], "neither True nor False"),
        (["--model", "llama", "--reversed"], "writes an HF directory"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--input_path", "x", "--output_path", "y.bin"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
