"""An exponential moving average of the weights (after Polyak and Juditsky 1992): updates in, a second model out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn

from llama31_core.training.weights import TrainedWeights


class _Blend(nn.Cell):  # type: ignore[misc]
    """average + share * (value - average)."""

    def __init__(self, share: float) -> None:
        super().__init__(auto_prefix=False)
        self._share = share

    def construct(self, average: Tensor, value: Tensor) -> Tensor:
        return average + (value - average) * self._share


class MovingAverage:
    """`average = decay * average + (1 - decay) * weight` after every update, of what is trained.

    Args:
        weights: what is averaged; the average begins at their values.
        decay: close to 1; the average is over the last 1 / (1 - decay) updates or so.
    """

    def __init__(self, weights: TrainedWeights, decay: float) -> None:
        self._weights = weights
        self._names = [name for name in weights.names() if weights.is_trained(name)]
        self._blend = _Blend(1 - decay)
        self._tensors = {name: Tensor(weights.tensors[name].asnumpy().copy()) for name in self._names}

    def load(self, values: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Go on from a checkpoint's."""
        self._tensors = {name: Tensor(values[name]) for name in self._names}

    def update(self) -> None:
        """Take note of the weights as they are."""
        for name in self._names:
            self._tensors[name] = self._blend(self._tensors[name], self._weights.tensors[name])

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """Averages by name."""
        return {name: tensor.asnumpy() for name, tensor in self._tensors.items()}
