"""A Llama's parameters run by the native kernels: one operator from token ids to logits.

Shapes: B sequences, T new tokens of each, M blocks of the longest sequence, N rows of logits, V = vocab_size.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from llama31_core.kernels.native.operator import native_operator
from llama31_core.model import Llama
from llama31_core.model.transformer import TransformerBlock
from llama31_core.rope_frequencies import inverse_frequencies


class NativeLlama(nn.Cell):  # type: ignore[misc]
    """Runs the parameters of a model that was built with `PagedAttention` over slots (num_blocks * block_size, K, D).

    A row of its results does not depend on the other rows of a batch, nor on how a prompt is cut into chunks, to the
    last bit. Products take activations rounded to the weights' type and add up in float32.

    Args:
        llama: holds the parameters; matrices all in float32 or all in bfloat16, or quantised; norms and caches in
            float32.

    Raises:
        NativeKernelsError: not on this machine.
    """

    def __init__(self, llama: Llama) -> None:
        super().__init__(auto_prefix=False)
        eps, block_size = llama.config.norm_eps, llama.model.layers[0].attention.core.block_size
        table = _matrix(llama.model.tok_embeddings)
        quantization = llama.config.quantization
        group_size = 0 if quantization is None else quantization.group_size
        self.held = (
            Tensor(np.array([eps, block_size, group_size], np.float32)),
            Tensor(inverse_frequencies(llama.config)),
            llama.model.norm_out.weight,
            *table,
            *(table if llama.lm_head is None else _matrix(llama.lm_head)),
            *(parameter for block in llama.model.layers for parameter in _layer(block)),
        )
        dtypes = [ms.int32] * 5 + [tensor.dtype for tensor in self.held]
        kind = str(_matrix(llama.model.layers[0].attention.wq)[0].dtype)
        name = f"Llama31Model_{len(dtypes)}_{kind}"
        self._run = native_operator("Llama31Model", dtypes, 1, name=name)

    def construct(
        self, tokens_BT: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor, wanted_N: Tensor
    ) -> Tensor:
        """Logits (N, V) of the tokens whose indexes among the B * T are wanted."""
        return self._run(tokens_BT, positions_BT, slots_BT, block_tables_BM, wanted_N, *self.held)


def _layer(block: TransformerBlock) -> tuple[ms.Parameter, ...]:
    """A layer's parameters in the operator's order; it writes new keys and values into the caches."""
    attention, feed_forward = block.attention, block.feed_forward
    return (
        block.attention_norm.weight,
        *(parameter for name in ("wq", "wk", "wv", "wo") for parameter in _matrix(getattr(attention, name))),
        block.ffn_norm.weight,
        *(parameter for name in ("w1", "w2", "w3") for parameter in _matrix(getattr(feed_forward, name))),
        attention.core.k_cache,
        attention.core.v_cache,
    )


def _matrix(cell: nn.Cell) -> list[ms.Parameter]:
    """A cell's matrix: its one parameter, or numbers, scales and biases."""
    return list(cell.get_parameters())
