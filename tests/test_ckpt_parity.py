"""A trained model through llama31-ckpt, against transformers reading the same file by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama31_ckpt.cli import main
from llama31_core.checkpoint import check_weights, open_weights, spell
from llama31_core.config import ModelConfig
from model_assets import fetch

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ckpt") / "smollm2"
    assert main(["convert", "--input_path", str(fetch("smollm2-gguf")), "--output_path", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """transformers' own reading of the GGUF file, with its own names and its own permutation of the rotary rows."""
    gguf = str(fetch("smollm2-gguf"))
    with torch.device("meta"):
        config = transformers.LlamaConfig(**load_gguf_checkpoint(gguf)["config"])
        skeleton = transformers.LlamaForCausalLM(config)
    tensors: dict[str, torch.Tensor] = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=skeleton)[
        "tensors"
    ]
    return tensors


def _state_dict(model_dir: Path) -> dict[str, torch.Tensor]:
    with open_weights(model_dir) as reader:
        return {spell(name, "hf"): torch.from_numpy(reader.read(name)) for name in reader.names()}


def test_converted_directory_fits_its_config(model_dir: Path) -> None:
    config = ModelConfig.from_pretrained(model_dir)
    assert config == ModelConfig.preset("smollm2-135m")
    with open_weights(model_dir) as reader:
        check_weights(reader, config)


def test_every_tensor_equals_what_transformers_reads_from_the_same_gguf(
    model_dir: Path, reference: dict[str, torch.Tensor]
) -> None:
    ours = _state_dict(model_dir)
    assert set(ours) == set(reference)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, reference[name])] == []


def test_greedy_answer_of_the_converted_model_is_paris(model_dir: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(model_dir)).eval()
    missing, unexpected = model.load_state_dict(_state_dict(model_dir), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
