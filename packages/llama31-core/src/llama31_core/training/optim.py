"""AdamW with global-norm clipping: gradients in, weights changed in place, the norm out."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

_square_sum = ops.MultitypeFuncGraph("square_sum")
_update = ops.MultitypeFuncGraph("update")


@_square_sum.register("Tensor")  # type: ignore[untyped-decorator]
def _square_sum_of(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


@_update.register("Function", "Number", "Number", *["Tensor"] * 8)  # type: ignore[untyped-decorator]
def _update_one(
    adam: ops.Primitive,
    beta1: float,
    beta2: float,
    rate: Tensor,
    eps: Tensor,
    scale: Tensor,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    decay: Tensor,
    gradient: Tensor,
) -> Tensor:
    return adam(weight, mean, variance, rate, beta1, beta2, eps, decay, gradient * scale)


class AdamW(nn.Cell):  # type: ignore[misc]
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2); norms are not decayed.

    MindSpore's fused operator leaves the bias correction out. With c1 = 1 - beta1^t and c2 = 1 - beta2^t, the
    corrected update `lr * (m / c1) / (sqrt(v / c2) + eps) + lr * decay * w` is what the operator computes with
    rate `lr * sqrt(c2) / c1`, epsilon `eps * sqrt(c2)` and decay `decay * c1 / sqrt(c2)`.

    Args:
        parameters: what is trained.
        beta1, beta2, eps, weight_decay: as in the paper.
        max_norm: gradients are scaled down so that their global norm is at most this; None leaves them.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        max_norm: float | None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self._beta1, self._beta2, self._eps = beta1, beta2, eps
        self._max_norm = float("inf") if max_norm is None else max_norm
        self._decay = weight_decay
        self.weights = ParameterTuple(parameters)
        self.means = self.weights.clone("adam_mean", "zeros")
        self.variances = self.weights.clone("adam_variance", "zeros")
        self._is_decayed = tuple(len(parameter.shape) > 1 for parameter in parameters)
        self._map = ops.HyperMap()
        self._adam = ops.AdamWeightDecay()

    def scalars(self, step: int, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, epsilon and decay of a step (counted from 0) with the bias correction folded in."""
        c1, c2 = 1 - self._beta1 ** (step + 1), float(np.sqrt(1 - self._beta2 ** (step + 1)))
        values = (learning_rate * c2 / c1, self._eps * c2, self._decay * c1 / c2)
        rate, eps, decay = (Tensor(value, ms.float32) for value in values)
        return rate, eps, decay

    def construct(self, gradients: tuple[Tensor, ...], rate: Tensor, eps: Tensor, decay: Tensor) -> Tensor:
        """Change the weights and give the gradients' global norm before clipping."""
        norm = ops.sqrt(ops.addn(self._map(_square_sum, gradients)))
        scale = ops.minimum(self._max_norm / (norm + 1e-6), ops.ones_like(norm))
        decays: tuple[Tensor, ...] = ()
        for is_decayed in self._is_decayed:
            decays += (decay if is_decayed else ops.zeros_like(decay),)
        update = ops.partial(_update, self._adam, self._beta1, self._beta2, rate, eps, scale)
        updated = self._map(update, self.weights, self.means, self.variances, decays, gradients)
        return ops.depend(norm, updated)
