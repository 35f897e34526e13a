"""Adapters beside the base weights against peft's own computation, and against weights merged by llama31-ckpt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers
from mindspore import Tensor

from llama31_ckpt.cli import main as ckpt
from llama31_core.checkpoint import open_weights
from llama31_core.config import ModelConfig
from llama31_core.lora.adapter import LowRank, read_adapter
from llama31_core.lora.layers import LoraLayers, is_adapter_parameter
from llama31_core.lora.table import BASE_SLOT, AdapterTable
from llama31_core.model import CausalAttention, Llama
from llama31_core.model.layers import Layers

TOLERANCE = 1e-4  # float32 sums in another order; logits are of a size of a few units
TOKENS = np.random.default_rng(0).integers(0, 96, (4, 11))
ADAPTERS = {
    "attention": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "all": peft.LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"layers.1.mlp.down_proj": 8, "o_proj": 2},
        alpha_pattern={"gate_proj": 1, "layers.0.self_attn.k_proj": 24},
    ),
}
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in HF's form, with all that a checkpoint of its own kind has."""
    path = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_dirs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as peft saves them, with B filled (a fresh one is zero and changes nothing)."""
    paths = {}
    for name, config in ADAPTERS.items():
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base_dir), config)
        torch.manual_seed(len(name))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.15)
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths


def build_net(model_dir: Path, layers: Layers | None = None) -> Callable[[npt.NDArray[np.int64]], Logits]:
    """A compiled forward pass of whole sequences, its shapes left open."""
    ms.set_context(mode=ms.GRAPH_MODE)
    config = ModelConfig.from_pretrained(model_dir)
    net = Llama(config, CausalAttention, layers)
    with open_weights(model_dir) as weights:
        for name, parameter in net.parameters_and_names():
            if not is_adapter_parameter(name):
                parameter.set_data(Tensor(weights.read(name).astype(np.float32)))
    net.set_train(False)
    any_shape = Tensor(shape=[None, None], dtype=ms.int32)
    net.set_inputs(any_shape, any_shape, any_shape)

    def forward(tokens_BT: npt.NDArray[np.int64]) -> Logits:
        positions = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        inputs = (Tensor(array.astype(np.int32)) for array in (tokens_BT, positions, np.zeros_like(tokens_BT)))
        logits: Logits = net(*inputs).asnumpy()
        return logits

    return forward


def peft_logits(base_dir: Path, adapter_dir: Path | None, tokens: npt.NDArray[np.int64]) -> Logits:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    if adapter_dir is not None:
        model = peft.PeftModel.from_pretrained(model, adapter_dir)
    with torch.no_grad():
        logits: Logits = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def test_each_row_has_its_own_adapter_as_peft_and_the_merged_model_compute_it(
    base_dir: Path, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    layers = LoraLayers(max_loras=3, max_lora_rank=8, max_rows=4)
    forward = build_net(base_dir, layers)
    table = AdapterTable(ModelConfig.from_pretrained(base_dir), layers, max_loras=3, max_lora_rank=8)
    base = forward(TOKENS)
    slots = {name: table.load(name, read_adapter(path)).slot for name, path in adapter_dirs.items()}

    layers.select([slots["all"], BASE_SLOT, slots["attention"], slots["all"]])
    got = forward(TOKENS)
    expected = {name: peft_logits(base_dir, path, TOKENS) for name, path in adapter_dirs.items()}
    for row, name in ((0, "all"), (2, "attention"), (3, "all")):
        assert np.abs(got[row] - expected[name][row]).max() < TOLERANCE
        assert np.abs(got[row] - base[row]).max() > 0.5  # the adapter does change something
    assert np.abs(got[1] - base[1]).max() < TOLERANCE
    assert np.abs(base - peft_logits(base_dir, None, TOKENS)).max() < TOLERANCE

    for name, path in adapter_dirs.items():
        merged = tmp_path / name
        command = ["convert", "--input_path", str(base_dir), "--output_path", str(merged), "--lora", str(path)]
        assert ckpt(command) == 0
        layers.select([slots[name]] * 2)
        assert np.abs(forward(TOKENS[:2]) - build_net(merged)(TOKENS[:2])).max() < TOLERANCE

    table.unload("all", lambda adapter: False)
    layers.select([slots["all"], slots["attention"]])
    after = forward(TOKENS[:2])
    assert np.abs(after[0] - base[0]).max() < TOLERANCE
    assert np.abs(after[1] - expected["attention"][1]).max() < TOLERANCE


def test_what_is_not_finite_in_one_row_stays_there(base_dir: Path, adapter_dirs: dict[str, Path]) -> None:
    layers = LoraLayers(max_loras=2, max_lora_rank=8, max_rows=4)
    forward = build_net(base_dir, layers)
    table = AdapterTable(ModelConfig.from_pretrained(base_dir), layers, max_loras=2, max_lora_rank=8)
    base = forward(TOKENS)
    huge = {
        name: LowRank(change.a * np.float32(1e30), change.b * np.float32(1e30), change.scale)
        for name, change in read_adapter(adapter_dirs["all"]).changes.items()
    }
    layers.write(2, huge)
    slot = table.load("attention", read_adapter(adapter_dirs["attention"])).slot
    layers.select([2, slot, BASE_SLOT, slot])
    got = forward(TOKENS)
    assert not np.isfinite(got[0]).all()
    assert np.abs(got[2] - base[2]).max() < TOLERANCE
    assert np.abs(got[1] - peft_logits(base_dir, adapter_dirs["attention"], TOKENS)[1]).max() < TOLERANCE
