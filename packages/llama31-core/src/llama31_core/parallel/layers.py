"""Layers that hold a rank's part of their weights: the layout table in, the model's own kinds of layers out.

A residual stream (B, T, E) runs between them: whole on every rank of the tp group, or with `sequence_parallel` some of
its tokens on each. A norm ends in what leads into split layers, so that projections which share an input share its
collective too.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llama31_core.config import ModelConfig
from llama31_core.model.embedding import TokenEmbedding
from llama31_core.model.layers import Layers
from llama31_core.model.linear import Linear
from llama31_core.model.norm import RMSNorm
from llama31_core.parallel.collectives import copy, gather_tokens, scatter_tokens, sum_of
from llama31_core.parallel.groups import Group, Groups
from llama31_core.parallel.layout import LAYOUT, axis_parts
from llama31_core.parallel.mesh import ParallelConfig


class RowParallelLinear(Linear):
    """A projection whose inputs are split: every rank has a share of each output, and the shares are added."""

    def __init__(self, in_features: int, out_features: int, dtype: ms.Type, leave: nn.Cell) -> None:
        super().__init__(in_features, out_features, dtype)
        self._leave = leave

    def construct(self, x: Tensor) -> Tensor:
        """Map a rank's part (..., in_features) of x to (..., out_features)."""
        return self._leave(self._multiply(x, self.weight))


class VocabParallelEmbedding(TokenEmbedding):
    """Rows `first` to `first + rows` of the table; tokens of other ranks give zeros, and the ranks add up."""

    def __init__(self, rows: int, first: int, dim: int, dtype: ms.Type, leave: nn.Cell) -> None:
        super().__init__(rows, dim, dtype)
        self._rows = rows
        self._first = first
        self._leave = leave

    def construct(self, tokens_BT: Tensor) -> Tensor:
        """Vectors (B, T, dim) for ids (B, T)."""
        local_BT = tokens_BT - self._first
        is_own_BT = ops.logical_and(local_BT >= 0, local_BT < self._rows)
        own_BT = local_BT * is_own_BT.astype(tokens_BT.dtype)
        vectors = ops.gather(self.embedding_weight, own_BT, 0)
        return self._leave(vectors * is_own_BT[:, :, None].astype(vectors.dtype))


class TokenPartEmbedding(TokenEmbedding):
    """The whole table, looked up for the rank's own tokens alone (sequence parallel without a split vocabulary)."""

    def __init__(self, vocab_size: int, dim: int, dtype: ms.Type, group: Group) -> None:
        super().__init__(vocab_size, dim, dtype)
        self._size = group.size
        self._index = group.index

    def construct(self, tokens_BT: Tensor) -> Tensor:
        """Vectors (B, T / tp, dim) for ids (B, T)."""
        batch, tokens = tokens_BT.shape
        own = tokens_BT.reshape(batch, self._size, tokens // self._size)[:, self._index]
        return ops.gather(self.embedding_weight, own, 0)


class NormIntoSplit(RMSNorm):
    """A norm of the residual stream, and what leads from there into split layers."""

    def __init__(self, dim: int, eps: float, enter: nn.Cell) -> None:
        super().__init__(dim, eps)
        self.enter = enter

    def construct(self, x: Tensor) -> Tensor:
        """The normed stream (B, T, dim), whole on every rank."""
        return self.enter(self._normalise(x, self.weight, self.eps))


class ParallelLayers(Layers):
    """The layers of one rank.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """

    def __init__(
        self, config: ModelConfig, parallel: ParallelConfig, groups: Groups, param_dtype: ms.Type = ms.float32
    ) -> None:
        super().__init__(param_dtype)
        parallel.check(config)
        self._config = config
        self._parallel = parallel
        self._tp = groups.axis("tp")
        self._is_by_tokens = parallel.sequence_parallel and parallel.tp > 1

    def linear(self, name: str, in_features: int, out_features: int) -> nn.Cell:
        """A column-parallel or row-parallel projection, as the table says."""
        row = LAYOUT.get(f"model.layers.{{}}.{name}.weight") or LAYOUT[f"{name}.weight"]
        outputs, inputs = (axis_parts(axis, self._config, self._parallel) for axis in row)
        if inputs > 1:
            return RowParallelLinear(in_features // inputs, out_features, self.param_dtype, self._leave())
        return Linear(in_features, out_features // outputs, self.param_dtype)

    def embedding(self, vocab_size: int, dim: int) -> nn.Cell:
        """An embedding whose rows are split, or whole on every rank."""
        parts = axis_parts(LAYOUT["model.tok_embeddings.embedding_weight"][0], self._config, self._parallel)
        if parts > 1:
            rows = vocab_size // parts
            return VocabParallelEmbedding(rows, self._tp.index * rows, dim, self.param_dtype, self._leave())
        if self._is_by_tokens:
            return TokenPartEmbedding(vocab_size, dim, self.param_dtype, self._tp)
        return TokenEmbedding(vocab_size, dim, self.param_dtype)

    def norm(self, dim: int, eps: float) -> nn.Cell:
        """A norm; all of Llama's lead into split layers."""
        enter = gather_tokens(self._tp) if self._is_by_tokens else copy(self._tp)
        return NormIntoSplit(dim, eps, enter)

    def prepare_head(self, norm: NormIntoSplit) -> None:
        """Make the last norm, which works on all tokens in any case, lead into the split head."""
        norm.enter = copy(self._tp)

    def _leave(self) -> nn.Cell:
        return scatter_tokens(self._tp) if self._is_by_tokens else sum_of(self._tp)
