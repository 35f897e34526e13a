"""AdamW with global-norm clipping, a group of weights at a time: gradients in, weights changed in place.

A group is a layer, or what stands outside the layers. One graph serves all layers; its parameters are pointed at a
layer's weights and moments as in weights.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llama31_core.training.weights import layer_name

MEAN, VARIANCE = "adam_mean.", "adam_variance."


class Updatable(Protocol):
    """What is updated: `TrainedWeights`, or a rank's rows of them."""

    block_parameters: dict[str, Parameter]
    outer_parameters: dict[str, Parameter]
    layer_indices: Sequence[int]

    def names(self) -> list[str]: ...

    def is_trained(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def use_layer(self, index: int) -> None: ...


class _SquareSum(nn.Cell):  # type: ignore[misc]
    """The sum of squares of all elements of all gradients of a group."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self._half_square_sum = ops.L2Loss()

    def construct(self, *gradients: Tensor) -> Tensor:
        sums: tuple[Tensor, ...] = ()
        for gradient in gradients:
            sums += (self._half_square_sum(gradient),)
        return ops.stack(sums).sum() * 2.0


class _Update(nn.Cell):  # type: ignore[misc]
    """One step of a group's weights and moments, in place."""

    def __init__(self, parameters: list[Parameter], beta1: float, beta2: float) -> None:
        super().__init__(auto_prefix=False)
        self._beta1, self._beta2 = beta1, beta2
        self.weights = ParameterTuple(parameters)
        self.means = self.weights.clone(MEAN.rstrip("."), "zeros")
        self.variances = self.weights.clone(VARIANCE.rstrip("."), "zeros")
        self._is_decayed = tuple(len(parameter.shape) > 1 for parameter in parameters)
        self._adam = ops.AdamWeightDecay()

    def construct(self, rate: Tensor, eps: Tensor, decay: Tensor, scale: Tensor, *gradients: Tensor) -> Tensor:
        done = rate
        for i in range(len(self.weights)):
            gradient = gradients[i] * scale
            own_decay = decay if self._is_decayed[i] else ops.zeros_like(decay)
            updated = self._adam(
                self.weights[i], self.means[i], self.variances[i], rate, self._beta1, self._beta2, eps, own_decay,
                gradient,
            )  # fmt: skip
            done = ops.depend(done, updated)
        return done


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2); norms are not decayed.

    MindSpore's fused operator leaves the bias correction out. With c1 = 1 - beta1^t and c2 = 1 - beta2^t, the
    corrected update `lr * (m / c1) / (sqrt(v / c2) + eps) + lr * decay * w` is what the operator computes with
    rate `lr * sqrt(c2) / c1`, epsilon `eps * sqrt(c2)` and decay `decay * c1 / sqrt(c2)`.

    Args:
        weights: what is trained of them is updated.
        beta1, beta2, eps, weight_decay: as in the paper.

    Attributes:
        moments: `adam_mean.NAME` and `adam_variance.NAME` of every trained weight.
        num_updates: how many have been made; the bias correction goes by it.
    """

    def __init__(self, weights: Updatable, *, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
        self._weights = weights
        self._beta1, self._beta2, self._eps, self._decay = beta1, beta2, eps, weight_decay
        self.num_updates = 0
        self.trained = [name for name in weights.names() if weights.is_trained(name)]
        self.moments: dict[str, Tensor] = {}
        for name in self.trained:
            for kind in (MEAN, VARIANCE):
                self.moments[kind + name] = Tensor(np.zeros(weights.shape(name), np.float32))
        block = [p for p in weights.block_parameters.values() if p.requires_grad]
        outer = [p for p in weights.outer_parameters.values() if p.requires_grad]
        self._layer = _Update(block, beta1, beta2) if block else None
        self._outer = _Update(outer, beta1, beta2) if outer else None
        self._square_sum = _SquareSum()

    def load(self, moments: Mapping[str, npt.NDArray[np.float32]], num_updates: int) -> None:
        """Go on from the moments of a checkpoint."""
        self.moments = {name: Tensor(moments[name]) for name in self.moments}
        self.num_updates = num_updates

    def square_sum(self, gradients: Mapping[str, Tensor]) -> float:
        """Sum of squares of the gradients of all weights here."""
        groups = (names for _, names in self._groups())
        return math.fsum(float(self._square_sum(*(gradients[name] for name in names))) for names in groups)

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float) -> None:
        """Update every trained weight with its gradient times `scale`."""
        self.num_updates += 1
        c1, c2 = 1 - self._beta1**self.num_updates, math.sqrt(1 - self._beta2**self.num_updates)
        numbers = (learning_rate * c2 / c1, self._eps * c2, self._decay * c1 / c2, scale)
        scalars = tuple(Tensor(number, ms.float32) for number in numbers)
        for index, names in self._groups():
            update = self._outer if index is None else self._layer
            assert update is not None
            if index is not None:
                self._weights.use_layer(index)
            for name, mean, variance in zip(names, update.means, update.variances, strict=True):
                mean.set_data(self.moments[MEAN + name])
                variance.set_data(self.moments[VARIANCE + name])
            update(*scalars, *(gradients[name] for name in names))

    def _groups(self) -> list[tuple[int | None, list[str]]]:
        """Index of the layer, or None, and the names of its trained weights in the order of its graph."""
        groups: list[tuple[int | None, list[str]]] = []
        if self._outer is not None:
            groups.append((None, [parameter.name for parameter in self._outer.weights]))
        if self._layer is not None:
            names = [parameter.name for parameter in self._layer.weights]
            groups += [(i, [layer_name(name, i) for name in names]) for i in self._weights.layer_indices]
        return groups
