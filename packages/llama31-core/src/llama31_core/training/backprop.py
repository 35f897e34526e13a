"""Loss and gradients of a batch, layer by layer: few graphs compiled once, called from Python in the order of layers.

One graph of all layers, forward, backward and update, would be compiled for half a minute at 30 layers; these take
seconds at any depth, and what is kept between forward and backward is what `recompute` says. A call costs some 100 us.

Shapes: B sequences, T tokens, E = dim, N = B * T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llama31_core.training.batch import Batch
from llama31_core.training.block import BlockBackward, BlockForward, Recompute
from llama31_core.training.head import HeadGradient, HeadLoss, Objective, Vocabulary, label_chunks
from llama31_core.training.native_rows import build_cross_entropy
from llama31_core.training.pieces import chunk_size
from llama31_core.training.weights import TrainedWeights, layer_name


@dataclass
class Kept:
    """A layer's input and the activations that its backward graph takes."""

    inputs: Tensor  # (B, T, E)
    activations: tuple[Tensor, ...]


class _Embed(nn.Cell):  # type: ignore[misc]
    """Token ids to vectors in the type that is computed in."""

    def __init__(self, embedding: nn.Cell, dtype: ms.Type) -> None:
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self._dtype = dtype

    @property
    def weight(self) -> Parameter:
        """The table."""
        return self.embedding.embedding_weight

    def construct(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, E)."""
        return self.embedding(tokens_BT).astype(self._dtype)


class _EmbeddingGradient(nn.Cell):  # type: ignore[misc]
    """Adds the gradient of the embedding to `gradient` in place."""

    def __init__(self, embedding: _Embed, gradient: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self.gradient = gradient
        self._weights = ParameterTuple([embedding.weight])
        self._backward = ops.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, tokens_BT: Tensor, d_x_BTE: Tensor) -> Tensor:
        (d_weight,) = self._backward(self.embedding, self._weights)(tokens_BT, d_x_BTE)
        return ops.assign_add(self.gradient, d_weight)


class _Add(nn.Cell):  # type: ignore[misc]
    """Adds the second half of the tensors it is given to the first. (Tuples would be taken as constants.)"""

    def construct(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        sums: tuple[Tensor, ...] = ()
        for i in range(half):
            sums += (tensors[i] + tensors[half + i],)
        return sums


class _Clear(nn.Cell):  # type: ignore[misc]
    """Sets buffers to zero in place."""

    def __init__(self, buffers: list[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.buffers = ParameterTuple(buffers)

    def construct(self) -> Tensor:
        done = Tensor(0, ms.int32)
        for buffer in self.buffers:
            done = ops.depend(done, ops.assign(buffer, ops.zeros_like(buffer)))
        return done


class Backprop:
    """Loss of batches, and gradients summed over them until `clear`.

    Args:
        weights: what computes, and is differentiated where it is trained.
        objective: what is minimised.
        recompute: what is not kept between forward and backward.
        vocabulary: the rows of the output matrix that are here; all if None.

    Attributes:
        gradients: by the name of the weight, of what is trained and has got one.
    """

    def __init__(
        self,
        weights: TrainedWeights,
        objective: Objective,
        recompute: Recompute,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._weights = weights
        self.gradients: dict[str, Tensor] = {}
        model = weights.template.model
        self._embed, self._rope = _Embed(model.tok_embeddings, weights.compute_dtype), model.rope
        self._forward = BlockForward(weights.block, recompute)
        self._backward = BlockBackward(self._forward, recompute)
        self._head: HeadGradient | None = None
        self._add = _Add()
        self._buffers: dict[str, Parameter] = {}
        if model.norm_out.weight.name in weights.outer_parameters:
            is_fused = weights.has_native_rows and vocabulary is None and objective == Objective()
            cross_entropy = build_cross_entropy() if is_fused else None
            products = weights.products
            self._head = HeadGradient(HeadLoss(weights.template, objective, vocabulary, products), cross_entropy)
            self._head_loss = HeadLoss(weights.template, Objective(), vocabulary, products)
            self._buffers |= dict(zip((p.name for p in self._head.trained), self._head.gradients, strict=True))
            for cell in (self._head, self._head_loss):
                cell.set_train()
        self._embedding_gradient = self._build_embedding_gradient()
        self._clear_buffers = _Clear(list(self._buffers.values())) if self._buffers else None
        for cell in (self._forward, self._backward):
            cell.set_train()

    def _build_embedding_gradient(self) -> _EmbeddingGradient | None:
        embedding = self._embed.weight
        if not embedding.requires_grad or embedding.name not in self._weights.outer_parameters:
            return None
        if embedding.name not in self._buffers:
            buffer = Parameter(Tensor(np.zeros(embedding.shape, np.float32)), "embedding_gradient")
            self._buffers[embedding.name] = buffer
        return _EmbeddingGradient(self._embed, self._buffers[embedding.name])

    def clear(self) -> None:
        """Forget the gradients."""
        self.gradients = {}
        if self._clear_buffers is not None:
            self._clear_buffers()

    def loss(self, batch: Batch) -> float:
        """Summed cross-entropy of a batch's labels, whatever the objective; no gradients."""
        x_BTE = self._embed(Tensor(batch.tokens))
        x_BTE, _ = self._run_forward(x_BTE, self._weights.layer_indices, self._build_context(batch), keep=False)
        return self._run_head_loss(batch, x_BTE)

    def accumulate(self, batches: Sequence[Batch], scale: float) -> float:
        """Summed loss of the batches' labels; adds their gradients, times `scale`, to `gradients`."""
        return math.fsum(self._accumulate_one(batch, scale) for batch in batches)

    def _accumulate_one(self, batch: Batch, scale: float) -> float:
        context, layers = self._build_context(batch), self._weights.layer_indices
        x_BTE, kept = self._run_forward(self._embed(Tensor(batch.tokens)), layers, context, keep=True)
        loss, d_BTE = self._run_head(batch, x_BTE, scale)
        self._run_embedding_back(batch, self._run_backward(d_BTE, layers, context, kept))
        self.gradients.update(self._buffers)
        return loss

    def _run_forward(
        self, x_BTE: Tensor, layers: Sequence[int], context: tuple[Tensor, ...], *, keep: bool
    ) -> tuple[Tensor, list[Kept]]:
        kept = []
        for index in layers:
            self._weights.use_layer(index)
            y_BTE, activations = self._forward(x_BTE, *context)
            if keep:
                kept.append(Kept(x_BTE, activations))
            x_BTE = y_BTE
        return x_BTE, kept

    def _run_head(self, batch: Batch, x_BTE: Tensor, scale: float) -> tuple[float, Tensor]:
        """Summed loss, and the gradient of x times `scale`."""
        assert self._head is not None
        x_NE = x_BTE.reshape(-1, x_BTE.shape[-1])
        d_x_NE = ops.zeros_like(x_NE).astype(ms.float32)
        totals = []
        for chunk in self._chunks(batch):
            total, d_x_NE = self._head(x_NE, d_x_NE, *chunk, Tensor(scale, ms.float32))
            totals.append(total)
        return float(sum(float(total) for total in totals)), d_x_NE.astype(x_BTE.dtype).reshape(x_BTE.shape)

    def _run_head_loss(self, batch: Batch, x_BTE: Tensor) -> float:
        x_NE = x_BTE.reshape(-1, x_BTE.shape[-1])
        totals = [self._head_loss(x_NE, *chunk) for chunk in self._chunks(batch)]
        return float(sum(float(total) for total in totals))

    def _run_backward(
        self, d_BTE: Tensor, layers: Sequence[int], context: tuple[Tensor, ...], kept: list[Kept]
    ) -> Tensor:
        """The gradient of what the layers were given; `kept` is used up."""
        names = [parameter.name for parameter in self._backward.trained]
        rotation, biases = context[:3], context[3:]
        for index in reversed(layers):
            self._weights.use_layer(index)
            layer = kept.pop()
            d_BTE, new = self._backward(d_BTE, layer.inputs, *rotation, *layer.activations, *biases)
            own = [layer_name(name, index) for name in names]
            new = self._reduce(own, new)
            if own and own[0] in self.gradients:
                new = self._add(*(self.gradients[name] for name in own), *new)
            self.gradients.update(zip(own, new, strict=True))
        return d_BTE

    def _reduce(self, names: Sequence[str], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is kept of a layer's gradients of one batch: all of them."""
        return gradients

    def _run_embedding_back(self, batch: Batch, d_BTE: Tensor) -> None:
        if self._embedding_gradient is not None:
            self._embedding_gradient(Tensor(batch.tokens), d_BTE)

    def _build_context(self, batch: Batch) -> tuple[Tensor, ...]:
        positions_BT = Tensor(self._own(batch).positions)
        cos_BT1D, sin_BT1D = self._rope(positions_BT)
        return positions_BT, cos_BT1D, sin_BT1D, *(Tensor(bias) for bias in self._biases(batch))

    def _own(self, batch: Batch) -> Batch:
        """What of a batch is computed here: all of it."""
        return batch

    def _biases(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        """What the attention is given to know which token sees which."""
        return self._weights.block.attention.core.context(batch.segment_ids)  # type: ignore[no-any-return]

    def _chunks(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        labels_N = np.ascontiguousarray(batch.labels).reshape(-1)
        size = chunk_size(self._weights.config.vocab_size, labels_N.size)
        return [(Tensor(places), Tensor(labels)) for places, labels in label_chunks(labels_N, size)]
