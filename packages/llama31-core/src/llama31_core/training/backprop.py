"""Loss and gradients of a batch, layer by layer: few graphs compiled once, called from Python in the order of layers.

One graph of all layers, forward, backward and update, would be compiled for half a minute at 30 layers; these take
seconds at any depth, and what is kept between forward and backward is what `recompute` says. A call costs some 100 us.

Shapes: B sequences, T tokens, E = dim, N = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llama31_core.training.attention import attention_biases
from llama31_core.training.batch import Batch
from llama31_core.training.block import BlockBackward, BlockForward, Recompute
from llama31_core.training.head import HeadGradient, HeadLoss, Objective, chunk_size, label_chunks
from llama31_core.training.weights import TrainedWeights, layer_name


@dataclass
class _Kept:
    """A layer's input and the activations that its backward graph takes."""

    inputs: Tensor  # (B, T, E)
    activations: tuple[Tensor, ...]


class _EmbeddingGradient(nn.Cell):  # type: ignore[misc]
    """Adds the gradient of the embedding to `gradient` in place."""

    def __init__(self, embedding: nn.Cell, gradient: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self.gradient = gradient
        self._weights = ParameterTuple([embedding.embedding_weight])
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

    Attributes:
        gradients: by the name of the weight, of what is trained and has got one.
    """

    def __init__(self, weights: TrainedWeights, objective: Objective, recompute: Recompute) -> None:
        self._weights = weights
        self.gradients: dict[str, Tensor] = {}
        model = weights.template.model
        self._embed, self._rope = model.tok_embeddings, model.rope
        self._forward = BlockForward(weights.block, recompute)
        self._backward = BlockBackward(self._forward, recompute)
        self._head = HeadGradient(HeadLoss(weights.template, objective))
        self._head_loss = HeadLoss(weights.template, Objective())
        self._add = _Add()
        embedding = model.tok_embeddings.embedding_weight
        buffers = dict(zip((p.name for p in self._head.trained), self._head.gradients, strict=True))
        if embedding.requires_grad and embedding.name not in buffers:
            buffers[embedding.name] = Parameter(Tensor(np.zeros(embedding.shape, np.float32)), "embedding_gradient")
        self._buffers: dict[str, Parameter] = buffers
        self._clear_buffers = _Clear(list(buffers.values())) if buffers else None
        self._embedding_gradient = (
            _EmbeddingGradient(self._embed, buffers[embedding.name]) if embedding.requires_grad else None
        )
        for cell in (self._forward, self._backward, self._head, self._head_loss):
            cell.set_train()

    def clear(self) -> None:
        """Forget the gradients."""
        self.gradients = {}
        if self._clear_buffers is not None:
            self._clear_buffers()

    def loss(self, batch: Batch) -> float:
        """Summed cross-entropy of a batch's labels, whatever the objective; no gradients."""
        x_BTE, _ = self._run_forward(batch, keep=False)
        x_NE = x_BTE.reshape(-1, x_BTE.shape[-1])
        totals = [self._head_loss(x_NE, *chunk) for chunk in self._chunks(batch)]
        return float(sum(float(total) for total in totals))

    def accumulate(self, batch: Batch, scale: float) -> float:
        """Summed loss of a batch's labels; adds its gradients, times `scale`, to `gradients`."""
        x_BTE, kept = self._run_forward(batch, keep=True)
        x_NE = x_BTE.reshape(-1, x_BTE.shape[-1])
        d_x_NE = ops.zeros_like(x_NE)
        totals = []
        for chunk in self._chunks(batch):
            total, d_x_NE = self._head(x_NE, d_x_NE, *chunk, Tensor(scale, ms.float32))
            totals.append(total)
        self._run_backward(batch, d_x_NE.reshape(x_BTE.shape), kept)
        self.gradients.update(self._buffers)
        return float(sum(float(total) for total in totals))

    def _run_forward(self, batch: Batch, *, keep: bool) -> tuple[Tensor, list[_Kept]]:
        self._context = self._build_context(batch)
        x_BTE = self._embed(Tensor(batch.tokens))
        kept = []
        for index in self._weights.layer_indices:
            self._weights.use_layer(index)
            y_BTE, activations = self._forward(x_BTE, *self._context)
            if keep:
                kept.append(_Kept(x_BTE, activations))
            x_BTE = y_BTE
        return x_BTE, kept

    def _run_backward(self, batch: Batch, d_BTE: Tensor, kept: list[_Kept]) -> None:
        names = [parameter.name for parameter in self._backward.trained]
        for index in reversed(self._weights.layer_indices):
            self._weights.use_layer(index)
            layer = kept.pop()
            d_BTE, new = self._run_layer_back(d_BTE, layer)
            own = [layer_name(name, index) for name in names]
            if own and own[0] in self.gradients:
                new = self._add(*(self.gradients[name] for name in own), *new)
            self.gradients.update(zip(own, new, strict=True))
        if self._embedding_gradient is not None:
            self._embedding_gradient(Tensor(batch.tokens), d_BTE)

    def _run_layer_back(self, d_BTE: Tensor, layer: _Kept) -> tuple[Tensor, tuple[Tensor, ...]]:
        rotation, biases = self._context[:3], self._context[3:]
        d_x_BTE, gradients = self._backward(d_BTE, layer.inputs, *rotation, *layer.activations, *biases)
        return d_x_BTE, gradients

    def _build_context(self, batch: Batch) -> tuple[Tensor, ...]:
        positions_BT = Tensor(batch.positions)
        cos_BT1D, sin_BT1D = self._rope(positions_BT)
        biases = (Tensor(bias) for bias in attention_biases(batch.segment_ids))
        return positions_BT, cos_BT1D, sin_BT1D, *biases

    def _chunks(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        labels_N = np.ascontiguousarray(batch.labels).reshape(-1)
        size = chunk_size(self._weights.config.vocab_size, labels_N.size)
        return [(Tensor(places), Tensor(labels)) for places, labels in label_chunks(labels_N, size)]
