"""SmolLM2-135M-Instruct in float32 against transformers with the same weights.

That the weights are the same as transformers reads from the GGUF file by itself is test_ckpt_parity.py's matter.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core import Engine, ModelConfig, SamplingParams
from llama31_core.checkpoint import open_weights, spell
from llama31_core.model import CausalAttention, Llama
from llama31_tokenizer import ChatFormat, Tokenizer

TEXT = """The harbour town had two bridges, and for as long as anyone could remember only one of them opened. Ships that
came in with the evening tide had to wait until the baker, who kept the key, had finished his bread. Nobody minded.
Sailors bought rolls through the window, children counted masts, and the ferryman told the same three stories in a
different order every night. Then one autumn a surveyor arrived from the capital with a brass instrument and a list of
questions: how high does the water stand in March, how many carts cross on a market day, who pays for the rope? He
wrote every answer down, even those that contradicted each other, and on the last page he drew a third bridge. It would
be made of iron, he said, and it would open by itself. The town talked about it all winter; some were proud, a few were
afraid for the bread. In spring the river rose higher than the surveyor had written, and both old bridges held."""
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish, French and German.",
)


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> LlamaForCausalLM:
    config = ModelConfig.from_pretrained(smollm2_dir)
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf())).eval()
    with open_weights(smollm2_dir) as weights:
        state = {spell(name, "hf"): torch.from_numpy(weights.read(name)) for name in weights.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


def test_logits_of_two_hundred_tokens(smollm2_dir: Path, reference: LlamaForCausalLM) -> None:
    tokens = np.array([Tokenizer.from_pretrained(smollm2_dir).encode(TEXT)[:200]], np.int32)
    assert tokens.shape == (1, 200)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).logits[0].numpy()

    ms.set_context(mode=ms.GRAPH_MODE)
    llama = Llama(ModelConfig.from_pretrained(smollm2_dir), CausalAttention)
    with open_weights(smollm2_dir) as weights:
        for name, parameter in llama.parameters_and_names():
            parameter.set_data(Tensor(weights.read(name)))
    positions = np.arange(200, dtype=np.int32)[None]
    logits = llama(Tensor(tokens), Tensor(positions), Tensor(np.zeros_like(positions))).asnumpy()[0]

    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_sixty_four_greedy_tokens_of_five_prompts_in_one_batch(smollm2_dir: Path, reference: LlamaForCausalLM) -> None:
    chat = ChatFormat(Tokenizer.from_pretrained(smollm2_dir))
    prompts = [
        chat.encode_dialog([{"role": "user", "content": text}], add_generation_prompt=True).ids for text in PROMPTS
    ]
    engine = Engine.from_pretrained(smollm2_dir, num_blocks=128)
    completions = engine.generate(prompts, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        # Greedy decoding of the reference gives these tokens if each is its most likely one after those before it.
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + completion.token_ids])).logits[0]
        assert completion.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(completion.token_ids) == 64
