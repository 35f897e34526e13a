"""Runs batches of tokens through the model on a device: lists of ids in, NumPy logits out.

One graph with dynamic shapes computes prefill and decode of any batch, so nothing is compiled after the first call.
Shapes: B sequences, T new tokens of each, M blocks of the longest sequence, V = vocab_size.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from llama31_core.checkpoint import check_weights, open_weights
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.model import Llama, PagedAttention

_DEFAULT_CACHE_BYTES = 1 << 30


class _LastLogits(nn.Cell):  # type: ignore[misc]
    """The model with the head applied to the last token of every sequence alone."""

    def __init__(self, llama: Llama) -> None:
        super().__init__(auto_prefix=False)
        self.llama = llama

    def construct(self, tokens_BT: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor) -> Tensor:
        hidden_BTE = self.llama.model(tokens_BT, positions_BT, slots_BT, block_tables_BM)
        return self.llama.logits(hidden_BTE[:, -1])


class GraphRunner:
    """A model with its cache, compiled as one graph.

    Args:
        llama: a model built with `PagedAttention` over `num_blocks` blocks of `block_size` tokens.
        num_blocks: blocks of the cache.
        block_size: tokens of a block.
    """

    def __init__(self, llama: Llama, num_blocks: int, block_size: int) -> None:
        ms.set_context(mode=ms.GRAPH_MODE)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._net = _LastLogits(llama)
        self._net.set_train(False)
        any_shape = Tensor(shape=[None, None], dtype=ms.int32)
        self._net.set_inputs(any_shape, any_shape, any_shape, any_shape)

    @classmethod
    def from_pretrained(
        cls, model_dir: Path, config: ModelConfig, *, num_blocks: int | None = None, block_size: int = 16
    ) -> GraphRunner:
        """The model of a model directory, its weights as float32 (what CPU matrix products take)."""
        if block_size < 1 or (num_blocks is not None and num_blocks < 1):
            raise ConfigError(f"block_size is {block_size} and num_blocks {num_blocks}, allowed is >= 1")
        weights = open_weights(model_dir)
        check_weights(weights, config)
        if num_blocks is None:
            block_bytes = 2 * 4 * config.n_layers * config.n_kv_heads * config.head_dim * block_size
            context_blocks = -(-config.max_seq_len // block_size)
            num_blocks = max(1, min(_DEFAULT_CACHE_BYTES // block_bytes, 16 * context_blocks))
        with no_init_parameters():
            llama = Llama(config, lambda: PagedAttention(config, num_blocks, block_size))
        for name, parameter in llama.parameters_and_names():
            if name.endswith("_cache"):
                parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
            else:
                parameter.set_data(Tensor.from_numpy(weights.read(name).astype(np.float32)))
        return cls(llama, num_blocks, block_size)

    def forward(
        self, token_ids_BT: list[list[int]], starts_B: list[int], block_tables: list[list[int]]
    ) -> npt.NDArray[np.float32]:
        """Store keys and values of the new tokens and give the logits (B, V) of each sequence's last one."""
        tokens_BT = np.asarray(token_ids_BT, np.int32)
        positions_BT = np.asarray(starts_B, np.int32)[:, None] + np.arange(tokens_BT.shape[1], dtype=np.int32)
        # A table's tail beyond its own blocks points at block 0; the mask on positions hides it.
        tables_BM = np.zeros((len(block_tables), max(map(len, block_tables))), np.int32)
        for row, table in zip(tables_BM, block_tables, strict=True):
            row[: len(table)] = table
        slots_BT = np.take_along_axis(tables_BM, positions_BT // self.block_size, axis=1) * self.block_size
        slots_BT += positions_BT % self.block_size
        inputs = (Tensor(array) for array in (tokens_BT, positions_BT, slots_BT, tables_BM))
        logits: npt.NDArray[np.float32] = self._net(*inputs).asnumpy()
        return logits
