"""Context to 131,072 tokens: far positions and long prompts against transformers, chunks against the whole, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
import torch
from mindspore import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.runner import GraphRunner
from llama31_core.model import CausalAttention, Llama

Weights = dict[str, npt.NDArray[np.float32]]
Logits = npt.NDArray[np.float32]

# Llama 3.1's rotary embedding (theta, scaling, width of a head) in a small model.
CONFIG = ModelConfig(
    vocab_size=128, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=128, ffn_dim=64, rope_scaling=RopeScaling()
)
BLOCK_SIZE = 64


def reference(config: ModelConfig, weights: Weights) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf())).eval()
    model.load_state_dict({spell(name, "hf"): torch.from_numpy(value) for name, value in weights.items()})
    return model


@pytest.mark.parametrize("first", [0, 8192 - 150, 65_536, 131_072 - 300], ids=lambda first: f"from {first}")
def test_logits_at_far_positions_equal_transformers(first: int, random_weights: Callable[..., Weights]) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    weights = random_weights(CONFIG)
    tokens = np.random.default_rng(first).integers(0, CONFIG.vocab_size, (1, 300))
    positions = np.arange(first, first + 300, dtype=np.int32)[None]
    with torch.no_grad():
        expected = reference(CONFIG, weights)(
            torch.from_numpy(tokens), position_ids=torch.from_numpy(positions).long()
        ).logits.numpy()
    llama = Llama(CONFIG, CausalAttention)
    for name, parameter in llama.parameters_and_names():
        parameter.set_data(Tensor(weights[name]))
    logits = llama(Tensor(tokens.astype(np.int32)), Tensor(positions), Tensor(np.zeros_like(positions))).asnumpy()
    assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(expected).max() > 1


def prefill(runner: GraphRunner, tokens: list[int], chunk: int, wanted_from: int = 0) -> Logits:
    """Logits of the tokens from `wanted_from` on, computed `chunk` tokens at a time."""
    logits = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        end = start + len(part)
        table = list(range(-(-end // BLOCK_SIZE)))
        wanted = max(0, min(len(part), end - wanted_from))
        logits.append(runner.forward(ForwardInput([part], [start], [table], [wanted])))
    return np.concatenate(logits)


def test_chunks_equal_the_whole_and_transformers(
    random_weights: Callable[..., Weights], build_runner: Callable[..., GraphRunner]
) -> None:
    weights = random_weights(CONFIG)
    tokens = np.random.default_rng(7).integers(0, CONFIG.vocab_size, 3000).tolist()
    runner = build_runner(CONFIG, weights, num_blocks=48, block_size=BLOCK_SIZE)
    whole = prefill(runner, tokens, chunk=3000)
    with torch.no_grad():
        expected = reference(CONFIG, weights)(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(whole - expected).max() < 1e-4
    for chunk in (512, 77):  # also one that is no multiple of a block
        assert np.abs(prefill(runner, tokens, chunk) - whole).max() < 1e-5


@pytest.mark.slow
def test_a_prompt_of_the_whole_context_equals_transformers(
    random_weights: Callable[..., Weights], build_runner: Callable[..., GraphRunner]
) -> None:
    config = CONFIG.model_copy(update={"n_layers": 1})
    weights = random_weights(config)
    tokens = np.random.default_rng(8).integers(0, config.vocab_size, config.max_seq_len).tolist()
    last = config.max_seq_len - 1000
    runner = build_runner(config, weights, num_blocks=config.max_seq_len // BLOCK_SIZE, block_size=BLOCK_SIZE)
    logits = prefill(runner, tokens[:-1], 512, last)
    table = list(range(config.max_seq_len // BLOCK_SIZE))
    decoded = runner.forward(ForwardInput([[tokens[-1]]], [len(tokens) - 1], [table], [1]))
    with torch.no_grad():
        hidden = reference(config, weights)(torch.tensor([tokens]), logits_to_keep=1000).logits[0].numpy()
    assert np.abs(np.concatenate([logits, decoded]) - hidden).max() < 1e-4


# A chunk of 64 tokens at the end of ever longer contexts, each of which needs its tables and no tokens before it.
_PEAKS = """
import json, re, sys
from pathlib import Path
from llama31_core.config import ModelConfig
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.runner import GraphRunner
from llama31_core.model import Llama, PagedAttention

config = ModelConfig(
    vocab_size=64, dim=64, n_layers=int(sys.argv[1]), n_heads=8, n_kv_heads=2, head_dim=16, ffn_dim=64
)
runner = GraphRunner(Llama(config, lambda: PagedAttention(config, 2048, 64)), 2048, 64)
peaks = []
for context in (16384, 32768, 65536, 131072):
    runner.forward(ForwardInput([[1] * 64], [context - 64], [list(range(context // 64))], [1]))
    # not ru_maxrss, which begins at that of the process that started this one
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("n_layers", [1, 4])
def test_memory_grows_with_the_context_and_no_faster_whatever_the_layers(n_layers: int) -> None:
    command = [sys.executable, "-c", _PEAKS, str(n_layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    grown = np.diff(json.loads(done.stdout.splitlines()[-1]))  # 16k, 32k and 64k tokens more than the one before
    print("bytes of 16k, 32k and 64k tokens more:", grown.tolist())
    scores = 4 * 64 * 8 * 65536
    assert scores < grown[-1] < 7 * scores  # of one layer: the layers share what they work in
    assert grown[-1] < 2.5 * grown[-2]  # twice the tokens, and what the allocator rounds up
