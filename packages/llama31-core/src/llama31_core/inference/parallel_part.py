"""A rank's part of a model and its cache, compiled as one graph: a stage's layers, split over the tp ranks.

Shapes: B sequences, T new tokens of each, M blocks of the longest sequence, N rows of logits, E = dim, V = vocab_size.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from llama31_core.checkpoint.sharded import open_for_rank
from llama31_core.config import ModelConfig
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.block_io import BlockIO
from llama31_core.inference.cache_plan import CachePlan
from llama31_core.inference.graph_input import graph_input, wanted_rows
from llama31_core.inference.values import caches, clear_caches, set_value
from llama31_core.model import Llama, PagedAttention
from llama31_core.parallel.groups import Groups
from llama31_core.parallel.layers import ParallelLayers
from llama31_core.parallel.layout import plan_shards
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.precision import Precision


class _Part(nn.Cell):  # type: ignore[misc]
    """Token ids (B, T) on the first stage, hidden states (B, T, E) on the others, to hidden states; on the last stage
    to the rank's columns of the wanted logits, (N, V / tp)."""

    def __init__(self, llama: Llama, is_first: bool, is_last: bool) -> None:
        super().__init__(auto_prefix=False)
        self.llama = llama
        self._is_first = is_first
        self._is_last = is_last

    def construct(
        self, x: Tensor, positions_BT: Tensor, slots_BT: Tensor, block_tables_BM: Tensor, wanted_N: Tensor
    ) -> Tensor:
        model = self.llama.model
        if self._is_first:
            x = model.tok_embeddings(x).astype(model.compute_dtype)
        cos_BT1D, sin_BT1D = model.rope(positions_BT)
        for layer in model.layers:
            x = layer(x, positions_BT, cos_BT1D, sin_BT1D, slots_BT, block_tables_BM)
        if not self._is_last:
            return x
        rows_NE = x.reshape(-1, x.shape[-1])[wanted_N]
        return self.llama.logits(model.norm_out(rows_NE))


def splits_logits(config: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether the ranks of the last stage have some columns of the logits each, and not all of them all."""
    return parallel.tp > 1 and (parallel.vocab_parallel or not config.tie_word_embeddings)


class PartRunner:
    """What a rank computes of a step.

    Attributes:
        has_columns: the logits are some of the vocabulary's columns, others are on the other tp ranks.
    """

    def __init__(
        self,
        weights: Path,
        config: ModelConfig,
        parallel: ParallelConfig,
        groups: Groups,
        plan: CachePlan,
        precision: Precision,
    ) -> None:
        ms.set_context(mode=ms.GRAPH_MODE)
        at = parallel.coordinates(groups.rank)
        stage = parallel.stage_layers(config)[at.pp]
        self._is_first, self._is_last = at.pp == 0, at.pp == parallel.pp - 1
        self.has_columns = self._is_last and splits_logits(config, parallel)
        self._block_size = plan.block_size
        if precision.compute == "float32":
            precision = Precision()  # the portable kernels, which serve a CPU's ranks, know no other weights beside it
        param, self._compute = (getattr(ms, name) for name in (precision.param, precision.compute))
        own_heads = config.model_copy(update={"n_kv_heads": max(1, config.n_kv_heads // parallel.tp)})
        with no_init_parameters():
            llama = Llama(
                config.model_copy(update={"n_layers": len(stage)}),
                lambda: PagedAttention(own_heads, plan.num_blocks, plan.block_size, self._compute),
                ParallelLayers(config, parallel, groups, param),
                self._compute,
            )
        _load(llama, weights, config, parallel, groups.rank, stage[0])
        self._net = _Part(llama, self._is_first, self._is_last)
        self._net.set_train(False)
        ids = Tensor(shape=[None, None], dtype=ms.int32)
        hidden = Tensor(shape=[None, None, config.dim], dtype=self._compute)
        self._net.set_inputs(ids if self._is_first else hidden, ids, ids, ids, Tensor(shape=[None], dtype=ms.int32))
        self._block_io = BlockIO(list(caches(llama)), plan.num_blocks, plan.num_host_blocks)

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """Carry out moves in this rank's caches."""
        self._block_io.move(moves)

    def forward(
        self, batch: ForwardInput, hidden_BTE: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Hidden states for the next stage, or of the last one logits (N, V / tp)."""
        tokens_BT, positions_BT, slots_BT, tables_BM = graph_input(batch, self._block_size)
        x = Tensor(tokens_BT) if self._is_first else Tensor(hidden_BTE).astype(self._compute)
        rest = (Tensor(array) for array in (positions_BT, slots_BT, tables_BM, wanted_rows(batch)))
        out: npt.NDArray[np.float32] = self._net(x, *rest).astype(ms.float32).asnumpy()
        return out[: sum(batch.num_logits)] if self._is_last else out


def _load(llama: Llama, path: Path, config: ModelConfig, parallel: ParallelConfig, rank: int, first_layer: int) -> None:
    """Read this rank's slices, and nothing else, of a checkpoint or of the rank's own directory; clear the caches."""
    clear_caches(llama)
    shards = plan_shards(config, parallel, rank)
    with open_for_rank(path, {name: shard.slices for name, shard in shards.items()}, rank=rank) as weights:
        for name, parameter in llama.parameters_and_names():
            shard = shards.get(_shifted(name, first_layer))
            if shard is not None:  # else it is a cache, or of another stage and not computed with here
                set_value(parameter, np.ascontiguousarray(weights.read_slice(shard.name, shard.slices)))


def _shifted(name: str, first_layer: int) -> str:
    """The whole model's name of a weight of a stage whose layers are counted from 0."""
    head, found, rest = name.partition("model.layers.")
    if head or not found:
        return name
    index, _, tail = rest.partition(".")
    return f"model.layers.{int(index) + first_layer}.{tail}"
