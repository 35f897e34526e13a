"""LoRA training against peft and torch's AdamW on the same data; what is saved is read by peft and by the engine."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers

from llama31_core import Engine, SamplingParams
from llama31_core.checkpoint import open_weights
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.options import EngineOptions
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import Batch
from llama31_core.training.checkpoints import AdapterFiles
from llama31_core.training.head import Objective
from llama31_core.training.lora import Lora, LoraTrainedLayers, adapted_modules, first_values, is_change, peft_name
from llama31_core.training.optim import AdamW
from llama31_core.training.step import TrainStep
from llama31_core.training.weights import TrainedWeights

STEPS, RATE, DECAY, EPS = 8, 1e-2, 0.1, 1e-6
LORA = Lora(("attention.wq", "attention.wv", "feed_forward.w2"), rank=4, alpha=8)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def peft_model(base_dir: Path, ours: TrainedWeights) -> peft.PeftModel:
    """peft's own model of the same adapter, with the matrices that ours begins with."""
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base_dir), config)
    values = {peft_name(name): torch.from_numpy(value) for name, value in ours.arrays() if is_change(name)}
    result = peft.set_peft_model_state_dict(model, values)
    assert not result.unexpected_keys
    return model


def begin(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """As training does, but for B, which is not zero: Adam would make steps of the rounding errors in A's gradient."""
    values = first_values(name, shape, 0)
    return values if values.any() else np.random.default_rng(1).normal(0, 0.1, shape).astype(np.float32)


def test_an_adapter_begins_as_no_change() -> None:
    a = first_values("model.layers.0.attention.wq.lora_a", (4, 64), 7)
    assert 0.11 < np.abs(a).max() <= 1 / 8
    np.testing.assert_array_equal(a, first_values("model.layers.0.attention.wq.lora_a", (4, 64), 7))
    assert not np.array_equal(a, first_values("model.layers.1.attention.wq.lora_a", (4, 64), 7))
    assert not first_values("model.layers.0.attention.wq.lora_b", (64, 4), 7).any()


def random_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 96, (2, 17)).astype(np.int32)
    return Batch.unpacked(ids[:, :-1], np.where(rng.random((2, 16)) < 0.3, -100, ids[:, 1:]).astype(np.int32))


def test_steps_equal_pefts_and_peft_and_the_engine_read_the_result(base_dir: Path, tmp_path: Path) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    config = ModelConfig.from_pretrained(base_dir)
    ours = TrainedWeights(config, BlockwiseAttention, LoraTrainedLayers(LORA))
    with open_weights(base_dir) as weights:
        ours.load(lambda name: begin(name, ours.shape(name)) if is_change(name) else weights.read(name))
    frozen = {name: value.copy() for name, value in ours.arrays() if not is_change(name)}
    model = peft_model(base_dir, ours)
    adam = AdamW(ours, beta1=0.9, beta2=0.95, eps=EPS, weight_decay=DECAY)
    assert set(adam.trained) == {name for name in ours.names() if is_change(name)}
    assert len(adam.trained) == 2 * 3 * config.n_layers
    step = TrainStep(Backprop(ours, Objective(), "none"), adam, max_norm=1.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch_adam = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=DECAY)

    for i in range(STEPS):
        batch = random_batch(i)
        logits = model(torch.from_numpy(batch.tokens).long()).logits.flatten(0, 1)
        want = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).long().flatten())
        torch_adam.zero_grad()
        want.backward()
        want_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        torch_adam.step()
        result = step([batch], RATE)
        assert result.loss == pytest.approx(want.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(want_norm.item(), rel=1e-4)

    theirs = peft.get_peft_model_state_dict(model)
    for name, value in ours.arrays():
        if is_change(name):
            np.testing.assert_allclose(value, theirs[peft_name(name)].numpy(), atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(value, frozen[name])

    changes = {name: ours.tensors[name].asnumpy() for name in adam.trained}
    AdapterFiles(base_dir, config, LORA).save(tmp_path / "adapter", changes, STEPS, {})
    check_that_peft_and_engine_read(base_dir, tmp_path / "adapter", model)


def check_that_peft_and_engine_read(base_dir: Path, adapter: Path, trained: peft.PeftModel) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    loaded = peft.PeftModel.from_pretrained(base, adapter)
    prompt = torch.arange(2, 9)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(prompt).logits, trained(prompt).logits, atol=1e-3)
        greedy = loaded.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, 7:].tolist()
    engine = Engine.from_pretrained(base_dir, EngineOptions(max_loras=1, max_lora_rank=LORA.rank, num_blocks=8))
    engine.load_adapter("own", adapter)
    engine.add("r", prompt[0].tolist(), SamplingParams(max_tokens=8, temperature=0), adapter="own")
    tokens = [token for _ in range(9) for output in engine.step() for token in output.token_ids]
    assert tokens == greedy


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (".*wq|.*wk", ("attention.wq", "attention.wk")),
        (r"model\.layers\.\d+\.mlp\.down_proj", ("feed_forward.w2",)),
        (["o_proj", "w1"], ("attention.wo", "feed_forward.w1")),
        ("all-linear", 7),
    ],
)
def test_targets_are_named_as_by_mindformers_and_by_peft(targets: str | list[str], modules: object) -> None:
    found = adapted_modules(targets, 2)
    assert (len(found) if isinstance(modules, int) else found) == modules


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (".*0.*wq", "names attention.wq of 1 of 2 layers"),
        (["lm_head"], r"names no projection; there are attention.wq \(q_proj\)"),
        ("(", "no regular expression"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(targets: str | list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted_modules(targets, 2)
