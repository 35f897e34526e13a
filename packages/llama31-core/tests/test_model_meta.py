"""The model against Meta's reference (`llama_models.llama3.model`), in float32 on a CPU.

That file imports fairscale, which is not among our requirements (PyPI has its sources alone): parallel layers, and how
many ranks there are. Over one rank these are torch's own layers, which stand in for them here; the rest of the file
runs as published.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
import torch
from llama_models.llama3.args import ModelArgs
from mindspore import Tensor

from llama31_core.checkpoint.names import spell
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.model import Llama, PagedAttention
from llama31_core.model.rope import RotaryEmbedding

Weights = dict[str, npt.NDArray[np.float32]]


class WholeLinear(torch.nn.Linear):  # type: ignore[misc]
    """Column- or row-parallel over one rank."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **parallel: Any) -> None:
        super().__init__(in_features, out_features, bias=bias)


class WholeEmbedding(torch.nn.Embedding):  # type: ignore[misc]
    """Vocabulary-parallel over one rank."""

    def __init__(self, num_embeddings: int, dim: int, **parallel: Any) -> None:
        super().__init__(num_embeddings, dim)


@pytest.fixture
def meta() -> Iterator[ModuleType]:
    """Meta's module, with torch's layers where it asks for fairscale's."""
    names = [
        "fairscale",
        "fairscale.nn",
        "fairscale.nn.model_parallel",
        "fairscale.nn.model_parallel.initialize",
        "fairscale.nn.model_parallel.layers",
    ]
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules[names[2]].initialize = modules[names[3]]
    modules[names[3]].get_model_parallel_world_size = lambda: 1
    modules[names[4]].ColumnParallelLinear = WholeLinear
    modules[names[4]].RowParallelLinear = WholeLinear
    modules[names[4]].VocabParallelEmbedding = WholeEmbedding
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "llama_models.llama3.model", raising=False)
        yield importlib.import_module("llama_models.llama3.model")
        sys.modules.pop("llama_models.llama3.model")


def interleaved(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key projection in Meta's order: the two of a rotated pair side by side."""
    out_features, in_features = weight.shape
    halves = weight.reshape(heads, 2, out_features // heads // 2, in_features)
    return halves.transpose(0, 2, 1, 3).reshape(out_features, in_features)


def reference(meta: ModuleType, config: ModelConfig, weights: Weights, context: int) -> Any:
    args = ModelArgs(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=32,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        use_scaled_rope=config.rope_scaling is not None,
        max_batch_size=1,
        max_seq_len=context,
    )
    model = meta.Transformer(args).eval()
    state = {}
    for name, value in weights.items():
        if name.endswith("attention.wq.weight"):
            value = interleaved(value, config.n_heads)
        elif name.endswith("attention.wk.weight"):
            value = interleaved(value, config.n_kv_heads)
        state[spell(name, "meta")] = torch.from_numpy(np.ascontiguousarray(value))
    model.load_state_dict(state)
    return model


CONFIG = ModelConfig(
    vocab_size=200,
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=192,  # 2/3 of 4 x 64 in multiples of 32, as Meta's code has it
    rope_theta=10000.0,
    rope_scaling=RopeScaling(),
)
CHUNK, COUNT = 1000, 9000  # beyond the original context of 8192


def chunks_of_ours(config: ModelConfig, weights: Weights, tokens: list[int]) -> Iterator[npt.NDArray[np.float32]]:
    block_size = 100
    llama = Llama(config, lambda: PagedAttention(config, len(tokens) // block_size, block_size))
    for name, parameter in llama.parameters_and_names():
        if name in weights:
            parameter.set_data(Tensor(weights[name]))
    for start in range(0, len(tokens), CHUNK):
        positions = np.arange(start, start + CHUNK, dtype=np.int32)[None]
        table = np.arange((start + CHUNK) // block_size, dtype=np.int32)[None]
        inputs = (np.array([tokens[start : start + CHUNK]], np.int32), positions, positions, table)
        yield llama(*map(Tensor, inputs)).asnumpy()[0]


@pytest.mark.parametrize("scaling", [RopeScaling(), None], ids=["scaled rotary", "plain rotary"])
def test_logits_equal_metas_chunk_by_chunk(
    scaling: RopeScaling | None, meta: ModuleType, random_weights: Callable[..., Weights]
) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = CONFIG.model_copy(update={"rope_scaling": scaling, "n_layers": 1 if scaling else 3})
    count = COUNT if scaling else 2 * CHUNK
    weights = random_weights(config)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, count).tolist()
    model = reference(meta, config, weights, count)
    for index, logits in enumerate(chunks_of_ours(config, weights, tokens)):
        start = index * CHUNK
        expected = model(torch.tensor([tokens[start : start + CHUNK]]), start)[0].numpy()
        assert np.abs(logits - expected).max() < 1e-4, f"tokens {start} to {start + CHUNK}"
        assert np.abs(expected).max() > 1


def test_angles_to_the_end_of_the_context_equal_metas(meta: ModuleType) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = ModelConfig.preset("llama3.1-8b")
    theirs = meta.precompute_freqs_cis(config.head_dim, config.max_seq_len, config.rope_theta, use_scaled=True)
    positions = np.r_[0:200, 8000:8400, 131072 - 300 : 131072].astype(np.int32)
    cos, sin = (
        table.asnumpy()[0, :, 0, : config.head_dim // 2] for table in RotaryEmbedding(config)(Tensor(positions[None]))
    )
    np.testing.assert_allclose(cos, theirs.real.numpy()[positions], atol=2e-6)
    np.testing.assert_allclose(sin, theirs.imag.numpy()[positions], atol=2e-6)
