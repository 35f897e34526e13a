"""Loss and gradients of one rank of a mesh: the parts of the model on its stage, the tokens of its place on cp.

Micro-batches go through the pipeline as schedule.py says. Everything that computes is compiled and is the same code as
on one process (training/backprop.py); what goes from stage to stage, and sums over ranks, stand between the graphs.

Shapes: B sequences, T tokens of the rank, E = dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
from mindspore import Tensor

from llama31_core.config import ModelConfig
from llama31_core.parallel.collectives import TokenGather
from llama31_core.parallel.gradients import MeshReduction, sum_numbers
from llama31_core.parallel.groups import Groups
from llama31_core.parallel.layers import ParallelLayers
from llama31_core.parallel.layout import plan_shards
from llama31_core.parallel.ring import RingAttention
from llama31_core.parallel.schedule import Action, plan_pipeline
from llama31_core.parallel.sequence import own_tokens, ring_biases
from llama31_core.parallel.transport import transport
from llama31_core.parallel.vocabulary import SplitVocabulary
from llama31_core.precision import Precision
from llama31_core.training.backprop import Backprop, Kept
from llama31_core.training.batch import Batch
from llama31_core.training.block import Recompute
from llama31_core.training.head import Objective
from llama31_core.training.native_attention import attention_core
from llama31_core.training.weights import TrainedWeights

Key = tuple[int, int]  # part, micro-batch


def build_weights(config: ModelConfig, groups: Groups, precision: Precision) -> TrainedWeights:
    """The rank's part of a model, without values yet."""
    layers = ParallelLayers(config, groups.parallel, groups)
    cp = groups.axis("cp")
    core = attention_core(config, precision) if cp.is_alone else partial(RingAttention, cp)
    held = plan_shards(config, groups.parallel, groups.rank)
    weights = TrainedWeights(config, core, layers, precision=precision, held=held)
    layers.prepare_head(weights.template.model.norm_out)
    return weights


@dataclass
class _Flight:
    """What one step has in hand between its actions."""

    batches: Sequence[Batch]
    scale: float
    inputs: dict[Key, Tensor] = field(default_factory=dict)
    slopes: dict[Key, Tensor] = field(default_factory=dict)
    outgoing: dict[Key, Tensor] = field(default_factory=dict)
    kept: dict[Key, list[Kept]] = field(default_factory=dict)
    contexts: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    loss: float = 0.0


class MeshBackprop(Backprop):
    """The part of `Backprop` that one rank does. All ranks of a replica are given the same batches.

    Args:
        weights: of `build_weights`.
        groups: of the rank.
        reduction: scatters a layer's gradients after every micro-batch with `shard_gradients`.
    """

    def __init__(
        self,
        weights: TrainedWeights,
        objective: Objective,
        recompute: Recompute,
        groups: Groups,
        reduction: MeshReduction,
    ) -> None:
        parallel, tp = groups.parallel, groups.axis("tp")
        vocabulary = None if tp.is_alone else SplitVocabulary(tp, weights.config.vocab_size // tp.size)
        super().__init__(weights, objective, recompute, vocabulary)
        self._groups, self._parallel, self._reduction = groups, parallel, reduction
        layers = parallel.part_layers(weights.config)
        self._layers = {part: layers[part] for part in range(groups.at.pp, parallel.num_parts, parallel.pp)}
        self._last = parallel.num_parts - 1
        self._by_tokens = parallel.sequence_parallel and not tp.is_alone
        self._tp = tp
        self._gather_tokens = TokenGather(tp) if self._by_tokens else None

    def accumulate(self, batches: Sequence[Batch], scale: float) -> float:
        """As `Backprop`, the loss summed over the replica's ranks; batches are those of whole sequences."""
        at, parallel = self._groups.at, self._parallel
        flight = _Flight(batches, scale)
        for action in plan_pipeline(parallel.pp, parallel.interleave, len(batches)).actions[at.pp]:
            if action.kind == "forward":
                self._do_forward(action.part, action.micro_batch, flight)
            elif action.kind == "backward":
                self._do_backward(action.part, action.micro_batch, flight)
            else:
                self._do_transfer(action, flight)
        self.gradients.update(self._buffers)
        return self._sum_over_replica(flight.loss)

    def loss(self, batch: Batch) -> float:
        """As `Backprop`; the batch goes through all parts by itself."""
        own = self._own(batch)
        context = self._build_context(batch)
        x_BTE = self._embed(Tensor(own.tokens)) if 0 in self._layers else None
        total = 0.0
        for part in range(self._last + 1):
            if part in self._layers:
                assert x_BTE is not None
                x_BTE, _ = self._run_forward(x_BTE, self._layers[part], context, keep=False)
            if part == self._last:
                total = self._run_head_loss(own, self._whole(x_BTE)) if part in self._layers else 0.0
            else:
                x_BTE = self._pass_on(part, x_BTE, own)
        return self._sum_over_replica(total)

    def _pass_on(self, part: int, x_BTE: Tensor | None, own: Batch) -> Tensor | None:
        """What part `part` gave, on the stage of the next one."""
        sender, receiver = part % self._parallel.pp, (part + 1) % self._parallel.pp
        if sender == receiver:
            return x_BTE
        if self._groups.at.pp == sender:
            self._hand_over(receiver, x_BTE, is_sender=True)
        elif self._groups.at.pp == receiver:
            return self._hand_over(sender, self._empty(own), is_sender=False)
        return None

    def _do_forward(self, part: int, number: int, flight: _Flight) -> None:
        own = self._own(flight.batches[number])
        if number not in flight.contexts:
            flight.contexts[number] = self._build_context(flight.batches[number])
        x_BTE = self._embed(Tensor(own.tokens)) if part == 0 else flight.inputs.pop((part, number))
        x_BTE, kept = self._run_forward(x_BTE, self._layers[part], flight.contexts[number], keep=True)
        flight.kept[part, number] = kept
        if part < self._last:
            self._put(part + 1, number, x_BTE, flight.inputs, flight)
            return
        loss, d_BTE = self._run_head(own, self._whole(x_BTE), flight.scale)
        flight.loss += loss
        flight.slopes[part, number] = self._share(d_BTE)

    def _do_backward(self, part: int, number: int, flight: _Flight) -> None:
        d_BTE, kept = flight.slopes.pop((part, number)), flight.kept.pop((part, number))
        d_BTE = self._run_backward(d_BTE, self._layers[part], flight.contexts[number], kept)
        if part > 0:
            self._put(part - 1, number, d_BTE, flight.slopes, flight)
        else:
            self._run_embedding_back(self._own(flight.batches[number]), d_BTE)
        if part == min(self._layers):
            del flight.contexts[number]

    def _put(self, part: int, number: int, x: Tensor, here: dict[Key, Tensor], flight: _Flight) -> None:
        """Keep what goes into a part: for itself if the part is here, else to be sent."""
        (here if part in self._layers else flight.outgoing)[part, number] = x

    def _do_transfer(self, action: Action, flight: _Flight) -> None:
        key = (action.part, action.micro_batch)
        if action.kind == "send":
            self._hand_over(action.peer, flight.outgoing.pop(key), is_sender=True)
            return
        empty = self._empty(self._own(flight.batches[action.micro_batch]))
        received = self._hand_over(action.peer, empty, is_sender=False)
        (flight.slopes if action.is_gradient else flight.inputs)[key] = received

    def _hand_over(self, stage: int, x: Tensor, *, is_sender: bool) -> Tensor:
        pair = self._groups.pair(stage)
        sender = pair.index if is_sender else 1 - pair.index
        return transport().hand_over(pair, sender)(x)

    def _reduce(self, names: Sequence[str], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self._parallel.shard_gradients:
            return gradients
        pairs = zip(names, gradients, strict=True)
        return tuple(self._reduction.scatter(name, gradient) for name, gradient in pairs)

    def _own(self, batch: Batch) -> Batch:
        return own_tokens(batch, self._groups.at.cp, self._parallel.cp)

    def _empty(self, own: Batch) -> Tensor:
        batch, tokens = own.tokens.shape
        tokens //= self._parallel.tp if self._by_tokens else 1
        return Tensor(np.zeros((batch, tokens, self._weights.config.dim), np.float32), self._weights.compute_dtype)

    def _whole(self, x_BTE: Tensor) -> Tensor:
        """All tokens of the rank's cp place, which the head takes."""
        return x_BTE if self._gather_tokens is None else self._gather_tokens(x_BTE)

    def _share(self, d_BTE: Tensor) -> Tensor:
        """Back from `_whole`: every tp rank has the same gradient of all tokens, and keeps its own."""
        if not self._by_tokens:
            return d_BTE
        tokens = d_BTE.shape[1] // self._tp.size
        return d_BTE[:, self._tp.index * tokens : (self._tp.index + 1) * tokens]

    def _biases(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        if self._parallel.cp == 1:
            return super()._biases(batch)
        return ring_biases(batch.segment_ids, self._groups.at.cp, self._parallel.cp)

    def _sum_over_replica(self, loss: float) -> float:
        for group in (self._groups.axis("cp"), self._groups.axis("pp")):
            loss = sum_numbers(loss, group)
        return loss
