"""Runs batches of tokens through the model on a device: lists of ids in, NumPy logits out.

One graph with dynamic shapes, or one function of the native kernels, computes prefill, decode and the check of guesses
for any batch, so nothing is compiled after the first call. Shapes: B sequences, T new tokens of each, M blocks of the
longest sequence, N rows of logits, V = vocab_size.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from llama31_core.checkpoint import open_weights
from llama31_core.checkpoint.quantized import check_stored
from llama31_core.config import ModelConfig
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.block_io import BlockIO
from llama31_core.inference.block_memory import BlockMemory
from llama31_core.inference.cache_dtype import cpu_cache_dtype
from llama31_core.inference.cache_plan import CachePlan
from llama31_core.inference.graph_input import graph_input, wanted_rows
from llama31_core.inference.native_llama import NativeLlama
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.values import caches, clear_caches, is_cache, set_value
from llama31_core.kernels.native import NativeKernelsError, load_library
from llama31_core.lora.layers import LoraLayers, is_adapter_parameter
from llama31_core.lora.table import BASE_SLOT
from llama31_core.model import Llama, PagedAttention
from llama31_core.model.layers import Layers
from llama31_core.model.quantized import QuantizedLayers
from llama31_core.precision import Precision

_LOG = logging.getLogger(__name__)
_NOT_COMPILED = "the native ones could not be compiled, see the warning"


class _WantedLogits(nn.Cell):  # type: ignore[misc]
    """The model with the head applied to some of the tokens alone."""

    def __init__(self, llama: Llama) -> None:
        super().__init__(auto_prefix=False)
        self.llama = llama
        self.set_train(False)
        any_shape = Tensor(shape=[None, None], dtype=ms.int32)
        self.set_inputs(any_shape, any_shape, any_shape, any_shape, Tensor(shape=[None], dtype=ms.int32))

    def construct(
        self, tokens_BT: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor, wanted_N: Tensor
    ) -> Tensor:
        hidden_BTE = self.llama.model(tokens_BT, positions_BT, slots_BT, block_tables_BM)
        return self.llama.logits(hidden_BTE.reshape(-1, hidden_BTE.shape[-1])[wanted_N])


class GraphRunner:
    """A model with its cache, compiled as one graph or run by the native kernels.

    Args:
        llama: a model built with `PagedAttention` over `num_blocks` blocks of `block_size` tokens.
        num_blocks: blocks of the cache.
        block_size: tokens of a block.
        num_host_blocks: blocks of host memory to swap to.
        adapters: the layers that the model was built with, if they have slots for adapters.
        native: run it by the native CPU kernels.

    Attributes:
        llama: the model, whose parameters may be pointed at other values; then call `find_parameters`.
    """

    def __init__(
        self,
        llama: Llama,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        adapters: LoraLayers | None = None,
        native: bool = False,
    ) -> None:
        ms.set_context(mode=ms.GRAPH_MODE)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.adapters = adapters
        self.llama = llama
        self._net = NativeLlama(llama) if native else _WantedLogits(llama)
        mover: type[BlockMemory] | type[BlockIO] = BlockMemory if native else BlockIO
        self._blocks = mover(list(caches(llama)), num_blocks, num_host_blocks)

    @classmethod
    def from_pretrained(
        cls, model_dir: Path, config: ModelConfig, plan: CachePlan, options: EngineOptions, precision: Precision
    ) -> GraphRunner:
        """The model of a model directory or weight file.

        Where everything is computed in float32, which a CPU does, the native kernels run it if they can; the portable
        ones, which serve any CPU and adapters, take float32 weights alone. `options` say whether there are slots for
        adapters.

        Raises:
            ConfigError: a cache in bfloat16 is asked for and the portable kernels have to serve.
            CheckpointError: the weights are missing, damaged or of another shape.
        """
        native = precision.compute == "float32" and not options.max_loras and native_kernels_here()
        if precision.compute == "float32" and not native:
            cpu_cache_dtype(options.kv_cache_dtype, has_small_weights=False, why_portable=_NOT_COMPILED)
            if precision.cache_dtype == "bfloat16" and options.num_blocks is None:  # blocks are twice as large now
                plan = replace(plan, num_blocks=max(1, plan.num_blocks // 2))
            precision = Precision()
        names = (precision.param, precision.compute, precision.cache_dtype)
        param, compute, cache = (getattr(ms, name) for name in names)
        lora = None
        if options.max_loras:
            lora = LoraLayers(options.max_loras, options.max_lora_rank, options.max_batch_size, param)
        layers = lora or Layers(param)
        if config.quantization is not None:
            layers = QuantizedLayers(config.quantization)
        with no_init_parameters():
            llama = Llama(
                config, lambda: PagedAttention(config, plan.num_blocks, plan.block_size, cache), layers, compute
            )
        load_parameters(llama, model_dir, config)
        return cls(llama, plan.num_blocks, plan.block_size, plan.num_host_blocks, lora, native)

    def find_parameters(self) -> None:
        """Some parameters have been pointed at other values."""
        if isinstance(self._net, NativeLlama):
            self._net.find_parameters()

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """See Runner."""
        self._blocks.move(moves)

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """See Runner."""
        if self.adapters is not None:
            self.adapters.select(batch.adapter_slots or [BASE_SLOT] * len(batch.starts))
        arrays = (*graph_input(batch, self.block_size), wanted_rows(batch))
        logits: npt.NDArray[np.float32]
        if isinstance(self._net, NativeLlama):
            logits = self._net(*arrays)
        else:
            logits = self._net(*(Tensor(array) for array in arrays)).asnumpy()
        return logits[: sum(batch.num_logits)]


def load_parameters(llama: Llama, path: Path, config: ModelConfig) -> None:
    """Give a model, built without values, the weights of a checkpoint in its own types; caches are cleared."""
    clear_caches(llama)
    with open_weights(path) as weights:
        check_stored(weights, config)
        for name, parameter in llama.parameters_and_names():
            if not is_cache(name) and not is_adapter_parameter(name):
                set_value(parameter, weights.read(name))


def native_kernels_here(*, warns: bool = True) -> bool:
    """Whether the native kernels can run on this machine; if not, a warning says why, unless another has said it."""
    if ms.get_context("device_target") != "CPU":
        return False
    try:
        load_library()
    except NativeKernelsError as error:
        if warns:
            _LOG.warning("%s; the portable kernels serve instead, at a fraction of the speed", error)
        return False
    return True
