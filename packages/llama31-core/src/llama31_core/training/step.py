"""One training step as one graph: tokens and labels in, loss and gradient norm out, weights changed in place.

Shapes: B sequences, T tokens of each.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llama31_core.model import Llama
from llama31_core.training.dataset import IGNORED_LABEL
from llama31_core.training.optim import AdamW


class NextTokenLoss(nn.Cell):  # type: ignore[misc]
    """Mean cross-entropy over the labels that are trained on."""

    def __init__(self, llama: Llama) -> None:
        super().__init__(auto_prefix=False)
        self.llama = llama

    def construct(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The loss, where `labels[b, t]` is the token to follow `tokens[b, t]`, or -100."""
        positions_BT = ops.zeros_like(tokens_BT) + ops.arange(tokens_BT.shape[1]).astype(ms.int32)
        logits = self.llama(tokens_BT, positions_BT, ops.zeros_like(tokens_BT))
        logits = logits.reshape(-1, logits.shape[-1])
        return ops.cross_entropy(logits, labels_BT.reshape(-1), ignore_index=IGNORED_LABEL)


class TrainStep(nn.Cell):  # type: ignore[misc]
    """Forward, backward and update."""

    def __init__(self, loss: NextTokenLoss, optimizer: AdamW) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.optimizer = optimizer
        self._loss_and_gradients = ops.value_and_grad(loss, None, optimizer.weights)

    def construct(
        self, tokens_BT: Tensor, labels_BT: Tensor, rate: Tensor, eps: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss before the update, and the gradients' norm before clipping."""
        loss, gradients = self._loss_and_gradients(tokens_BT, labels_BT)
        return loss, self.optimizer(gradients, rate, eps, decay)
