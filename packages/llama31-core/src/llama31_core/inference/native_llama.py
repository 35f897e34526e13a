"""A Llama's parameters run by the native kernels: one call from token ids to logits.

Shapes: B sequences, T new tokens of each, M blocks of the longest sequence, N rows of logits, V = vocab_size.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn

from llama31_core.checkpoint.quantized import BIAS_PARTS
from llama31_core.errors import CheckpointError
from llama31_core.kernels.native import load_library
from llama31_core.model import Llama
from llama31_core.model.transformer import TransformerBlock
from llama31_core.rope_frequencies import inverse_frequencies

_Ints = npt.NDArray[np.int32]
_Floats = npt.NDArray[np.float32]

_INPUTS = 5  # arrays that a call begins with

logger = logging.getLogger(__name__)


class NativeLlama:
    """Runs the parameters of a model that was built with `PagedAttention` over slots (num_blocks * block_size, K, D).

    A row of its results does not depend on the other rows of a batch, nor on how a prompt is cut into chunks, to the
    last bit. Products take activations rounded to the weights' type and add up in float32; keys and values are rounded
    to the cache's type when they are written. The kernels are called by themselves: as an operator in a graph of
    MindSpore's each call would cost 4 ms more.

    Args:
        llama: holds the parameters; matrices all in float32 or all in bfloat16, or quantised; caches all in float32 or
            all in bfloat16; norms in float32.

    Raises:
        NativeKernelsError: not on this machine.
    """

    def __init__(self, llama: Llama) -> None:
        eps, block_size = llama.config.norm_eps, llama.model.layers[0].attention.core.block_size
        self._num_rounded = 0
        table = self._matrix(llama.model.tok_embeddings)
        quantization = llama.config.quantization
        group_size = 0 if quantization is None else quantization.group_size
        self._held: tuple[Tensor, ...] = (
            Tensor(np.array([eps, block_size, group_size], np.float32)),
            Tensor(inverse_frequencies(llama.config)),
            llama.model.norm_out.weight,
            *table,
            *(table if llama.lm_head is None else self._matrix(llama.lm_head)),
            *(parameter for block in llama.model.layers for parameter in self._layer(block)),
        )
        if self._num_rounded:
            logger.warning(
                "%d biases of quantised weights are no 128ths of their scales and were rounded to such, by 1/256 of a "
                "scale at most; `llama31-ckpt quantize` makes none like that any more",
                self._num_rounded,
            )
        self._count = _INPUTS + len(self._held) + 1  # and the logits
        self._addresses = np.zeros(self._count, np.uint64)
        self._rows = [_row(held.shape) for held in self._held]  # kept, as their addresses are handed over
        pointers = ctypes.c_void_p * self._count
        self._shapes = pointers(*[0] * _INPUTS, *map(ctypes.addressof, self._rows), 0)
        dtypes = [*[b"int32"] * _INPUTS, *(str(held.dtype).lower().encode() for held in self._held), b"float32"]
        self._dtypes = (ctypes.c_char_p * self._count)(*dtypes)
        self._given_rows: list[ctypes.Array[ctypes.c_int64]] = []
        self.find_parameters()
        self._vocab_size = llama.config.vocab_size
        self._run = ctypes.CDLL(str(load_library())).Llama31Model

    def __call__(
        self, tokens_BT: _Ints, positions_BT: _Ints, slots_BT: _Ints, block_tables_BM: _Ints, wanted_N: _Ints
    ) -> _Floats:
        """Logits (N, V) of the tokens whose indexes among the B * T are wanted."""
        logits_NV = np.empty((len(wanted_N), self._vocab_size), np.float32)
        inputs = (tokens_BT, positions_BT, slots_BT, block_tables_BM, wanted_N)
        arrays = [np.ascontiguousarray(array, np.int32) for array in inputs]
        failed = self._run(*self.arguments(arrays, logits_NV))
        assert not failed, "the native library takes another number of arguments"
        return logits_NV

    def _layer(self, block: TransformerBlock) -> tuple[Tensor, ...]:
        """A layer's parameters in the library's order; it writes new keys and values into the caches."""
        attention, feed_forward = block.attention, block.feed_forward
        return (
            block.attention_norm.weight,
            *(part for cell in (attention.wq, attention.wk, attention.wv, attention.wo) for part in self._matrix(cell)),
            block.ffn_norm.weight,
            *(part for cell in (feed_forward.w1, feed_forward.w2, feed_forward.w3) for part in self._matrix(cell)),
            attention.core.k_cache,
            attention.core.v_cache,
        )

    def _matrix(self, cell: nn.Cell) -> list[Tensor]:
        """A cell's matrix: its one parameter, or numbers and ranges."""
        numbers, *ranges = cell.get_parameters()
        if not ranges:
            return [numbers]
        packed, num_rounded = pack_ranges(*(one.asnumpy() for one in ranges))
        self._num_rounded += num_rounded
        return [numbers, Tensor(packed)]

    def find_parameters(self) -> None:
        """Take the parameters' addresses again: some have been pointed at other values (no quantised ones).

        Not each call takes them: that was a millisecond, a tenth of a step.
        """
        self._addresses[_INPUTS:-1] = [held.data_ptr() for held in self._held]

    def arguments(self, arrays: Sequence[_Ints], logits_NV: _Floats) -> tuple[object, ...]:
        """The call's arguments as arguments.h has them: how many, addresses, shapes and types.

        They hold until the next call. Arrays are contiguous.
        """
        given = [*arrays, logits_NV]
        self._given_rows = [_row(array.shape) for array in given]
        for place, array, row in zip([*range(_INPUTS), -1], given, self._given_rows, strict=True):
            self._addresses[place], self._shapes[place] = array.ctypes.data, ctypes.addressof(row)
        return self._count, ctypes.c_void_p(self._addresses.ctypes.data), self._shapes, self._dtypes


def _row(shape: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(shape))(*shape)


def pack_ranges(scales_OG: _Floats, biases_OG: _Floats) -> tuple[_Ints, int]:
    """Scales and biases as matmul.h's Range: a bfloat16 number, and how many 128ths of it; how many had to be rounded.

    checkpoint/quantized.py makes none that cannot be told so.

    Raises:
        CheckpointError: a scale has more digits, or a bias is 256 scales or more.
    """
    bits_OG = scales_OG.view(np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros_OG = np.rint(biases_OG * BIAS_PARTS / scales_OG)
        num_rounded = int(np.count_nonzero(zeros_OG * (scales_OG / BIAS_PARTS) != biases_OG))
    fits_OG = (bits_OG & 0xFFFF == 0) & np.isfinite(scales_OG) & (np.abs(zeros_OG) < 1 << 15)
    if not fits_OG.all():
        raise CheckpointError(
            "quantised weights: a scale is no bfloat16 number, or a bias is not within 256 scales; expected weights "
            "that `llama31-ckpt quantize` made: make them again"
        )
    packed_OG: _Ints = zeros_OG.astype(np.int32) << 16 | (bits_OG >> 16 & 0xFFFF)
    return packed_OG, num_rounded
