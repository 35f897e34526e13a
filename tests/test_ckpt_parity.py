"""A trained model through llama31-ckpt, against transformers reading the same file by itself."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama31_ckpt.cli import main
from llama31_ckpt.sources import open_source
from llama31_core.checkpoint import check_weights, describe_file, open_weights, rotary_heads, spell
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


def test_greedy_answer_of_the_hf_directory_we_write_is_paris(model_dir: Path, tmp_path: Path) -> None:
    command = ["convert", "--input_path", str(model_dir), "--output_path", str(tmp_path / "hf"), "--reversed"]
    assert main(command) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float32
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def _logits(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' logits of some tokens with these weights."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**ModelConfig.preset("smollm2-135m").to_hf())
        ).eval()
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffer is no weight and was not loaded
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(1000, 1024)[None]).logits
    return logits


def test_logits_after_every_path_are_those_of_transformers_own_reading(
    model_dir: Path, reference: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """GGUF -> model directory -> HF -> MindFormers' fused .ckpt -> Meta's .pth -> tp 3 x pp 2 ranks -> one .ckpt.

    The logits are the same bits at every station, and in the end so is the model directory's file. (3 because the
    model's 9 and 3 heads do not divide by 2; `test_tp_2_x_pp_2_and_back` has that.)
    """
    expected = _logits(reference)
    assert expected.argmax(-1).unique().numel() > 5
    source = model_dir
    for command, name, options in (
        ("convert", "hf", ["--reversed"]),
        ("convert", "fused.ckpt", ["--qkv_concat"]),
        ("meta", "meta", []),
        ("shard", "ranks", ["--tp", "3", "--pp", "2"]),
        ("merge", "model", []),
    ):
        target = tmp_path / name
        if command == "meta":
            _write_meta(source, target)
        else:
            assert main([command, "--input_path", str(source), "--output_path", str(target), *options]) == 0
        with closing(open_source(target)) as opened:
            weights = opened.weights
            state = {spell(name, "hf"): torch.from_numpy(weights.read_slice(name, ())) for name in weights.names()}
        assert torch.equal(_logits(state), expected), name
        if source != model_dir:
            shutil.rmtree(source) if source.is_dir() else source.unlink()
        source = target
    assert describe_file(source / "model.safetensors") == describe_file(model_dir / "model.safetensors")


def test_tp_2_x_pp_2_and_back(tmp_path: Path) -> None:
    """A grouped-query model whose heads divide by 2, in bfloat16: transformers' logits before and after."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    for command, source, target, options in (
        ("shard", "hf", "ranks", ["--tp", "2", "--pp", "2"]),
        ("merge", "ranks", "model", []),
        ("convert", "model", "back", ["--reversed"]),
    ):
        arguments = [command, "--input_path", f"{tmp_path}/{source}", "--output_path", f"{tmp_path}/{target}", *options]
        assert main(arguments) == 0
    assert len(list((tmp_path / "ranks").glob("rank_*"))) == 4
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("hf", "back")]
    with torch.no_grad():
        before, after = (model(torch.arange(40)[None]).logits for model in models)
    assert torch.equal(after, before)


def _write_meta(source: Path, target: Path, num_shards: int = 3) -> None:
    """Tensor-parallel .pth shards as Meta writes them, with llama.cpp's way of interleaving the rotary rows."""
    target.mkdir()
    params = {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": -1, "rope_theta": 1e5}
    (target / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "max_seq_len": 8192}))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    with open_weights(source) as reader:
        for canonical in reader.names():
            tensor = torch.from_numpy(reader.read(canonical))
            heads = {"n_heads": 9, "n_kv_heads": 3}.get(rotary_heads(canonical) or "")
            if heads is not None:
                tensor = tensor.reshape(heads, 2, 32, -1).transpose(1, 2).reshape(tensor.shape)
            columns = canonical.endswith(("wo.weight", "w2.weight"))
            pieces = tensor.chunk(num_shards, int(columns)) if tensor.dim() == 2 else [tensor] * num_shards
            for shard, piece in zip(shards, pieces, strict=True):
                shard[spell(canonical, "meta")] = piece.clone()
    for rank, shard in enumerate(shards):
        torch.save(shard, target / f"consolidated.{rank:02d}.pth")
