"""Adapters merged and extracted by llama31-ckpt against the peft library's own arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from llama31_ckpt.cli import main
from llama31_core.config import ModelConfig

# In float32, of the greatest weight of a matrix (about 30 here): the merge sums the same products in another order, an
# extracted adapter has other factors, which are rounded too.
MERGE_TOLERANCE, EXTRACT_TOLERANCE = 3e-7, 1e-6
ADAPTERS = {
    "plain": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "all": peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1),
    "rank_stabilised": peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["k_proj", "down_proj"]),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 32},
    ),
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**ModelConfig.preset("tiny").to_hf())
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    expected, got = one.state_dict(), other.state_dict()
    assert set(expected) == set(got)
    for name, tensor in expected.items():
        assert (tensor - got[name]).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merging_is_peft_s_merge_and_unload(kind: str, base_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(load(base_dir), ADAPTERS[kind])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)  # a fresh B is zero and changes nothing
    model.save_pretrained(tmp_path / "adapter")
    command = ["convert", "--input_path", str(base_dir), "--lora", f"{tmp_path}/adapter", "--reversed"]
    assert main([*command, "--output_path", f"{tmp_path}/merged"]) == 0
    merged = peft.PeftModel.from_pretrained(load(base_dir), tmp_path / "adapter").merge_and_unload()
    base = load(base_dir).state_dict()
    assert any(not torch.equal(tensor, base[name]) for name, tensor in merged.state_dict().items())
    assert_same(merged, load(tmp_path / "merged"), MERGE_TOLERANCE)

    # And back: the difference as an adapter, which peft loads and merges to the same weights.
    extract = ["extract-lora", str(base_dir), f"{tmp_path}/merged", "--rank", "8"]
    assert main([*extract, "--output_path", f"{tmp_path}/extracted"]) == 0
    again = peft.PeftModel.from_pretrained(load(base_dir), tmp_path / "extracted").merge_and_unload()
    assert_same(merged, again, EXTRACT_TOLERANCE)
