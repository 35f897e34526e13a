"""A Llama's parameters run by the native kernels: the same calls and results as the model it is given.

Shapes: B sequences, T new tokens of each, M blocks of the longest sequence, E = dim, V = vocab_size.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from llama31_core.kernels.native import load_library
from llama31_core.model import Llama
from llama31_core.model.rope import inverse_frequencies
from llama31_core.model.transformer import TransformerBlock

_F32, _I32, _WEIGHT = "float32", "int32", "weight"
_FORMATS = {_F32: DataType.F32_Default, _I32: DataType.I32_Default}
_WEIGHT_FORMATS = (DataType.F32_Default, DataType.BF16_Default)


class NativeLlama(nn.Cell):  # type: ignore[misc]
    """Runs the parameters of a model that was built with `PagedAttention` over slots (num_blocks * block_size, K, D).

    A row of its results does not depend on the other rows of a batch, nor on how a prompt is cut into chunks, to the
    last bit. Products take activations rounded to the weights' type and add up in float32.

    Args:
        llama: holds the parameters; matrices all in float32 or all in bfloat16, norms and caches in float32.

    Raises:
        NativeKernelsError: not on this machine.
    """

    def __init__(self, llama: Llama) -> None:
        super().__init__(auto_prefix=False)
        self.llama = llama
        eps, block_size = llama.config.norm_eps, llama.model.layers[0].attention.core.block_size
        self.settings = Tensor(np.array([eps, block_size], np.float32))
        self.frequencies_D = Tensor(inverse_frequencies(llama.config))
        self.layers = nn.CellList([_NativeLayer(block, self.settings) for block in llama.model.layers])
        self._embed = _operator("Llama31Embedding", _I32, _WEIGHT)
        self._turns = _operator("Llama31Rope", _I32, _F32)
        self._norm = _operator("Llama31Norm", _F32, _F32, _F32)
        self._head = _operator("Llama31Linear", _F32, _WEIGHT)

    def construct(self, tokens_BT: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor) -> Tensor:
        """Logits (B, T, V) of every token."""
        return self.logits(self.model(tokens_BT, positions_BT, slots_BT, block_tables_BM))

    def model(self, tokens_BT: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor) -> Tensor:
        """Hidden states (B, T, E)."""
        x_BTE = self._embed(tokens_BT, self.llama.model.tok_embeddings.embedding_weight)
        turns = self._turns(positions_BT, self.frequencies_D)
        for layer in self.layers:
            x_BTE = layer(x_BTE, turns, positions_BT, slots_BT, block_tables_BM)
        return self._norm(x_BTE, self.llama.model.norm_out.weight, self.settings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., E)."""
        if self.llama.lm_head is None:
            return self._head(hidden, self.llama.model.tok_embeddings.embedding_weight)
        return self._head(hidden, self.llama.lm_head.weight)


class _NativeLayer(nn.Cell):  # type: ignore[misc]
    """One layer as one operator. It writes the new keys and values into the caches that it is given."""

    def __init__(self, block: TransformerBlock, settings: Tensor) -> None:
        super().__init__(auto_prefix=False)
        self.block = block
        self.settings = settings
        weights = [_F32, *[_WEIGHT] * 4, _F32, *[_WEIGHT] * 3]
        self._layer = _operator("Llama31Layer", _F32, _F32, _I32, _I32, _I32, _F32, *weights, _F32, _F32)

    def construct(
        self, x_BTE: Tensor, turns: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor
    ) -> Tensor:
        """The residual stream after this layer."""
        attention, feed_forward = self.block.attention, self.block.feed_forward
        return self._layer(
            x_BTE,
            turns,
            positions_BT,
            slots_BT,
            block_tables_BM,
            self.settings,
            self.block.attention_norm.weight,
            attention.wq.weight,
            attention.wk.weight,
            attention.wv.weight,
            attention.wo.weight,
            self.block.ffn_norm.weight,
            feed_forward.w1.weight,
            feed_forward.w2.weight,
            feed_forward.w3.weight,
            attention.core.k_cache,
            attention.core.v_cache,
        )


def _operator(function: str, *inputs: str) -> ops.Custom:
    info = CustomRegOp()
    for index in range(len(inputs)):
        info = info.input(index, f"x{index}")
    info = info.output(0, "y")
    for weight in _WEIGHT_FORMATS:  # MindSpore keeps one registration a function, so it has to name both types
        info = info.dtype_format(*(_FORMATS.get(kind, weight) for kind in inputs), DataType.F32_Default)
    # The output's shape comes from the library's <function>InferShape, which also serves dynamic shapes.
    return ops.Custom(
        f"{load_library()}:{function}",
        out_shape=None,
        out_dtype=ms.float32,
        func_type="aot",
        reg_info=info.target("CPU").get_op_info(),
    )
