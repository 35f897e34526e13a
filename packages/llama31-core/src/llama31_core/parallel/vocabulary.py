"""A vocabulary that is split over ranks: softmax and label's value over all of it, with logits that are never gathered.

Ranks exchange three numbers a token: the greatest logit, the sum of exponentials and the label's value (Shoeybi et al.
2019, section 3). Shapes: C tokens, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from llama31_core.parallel.groups import Group
from llama31_core.parallel.transport import transport
from llama31_core.training.head import Vocabulary


class SplitVocabulary(Vocabulary):
    """The rank's rows.

    Args:
        group: the ranks, in the order of their rows; two or more.
        num_rows: of each rank.
    """

    def __init__(self, group: Group, num_rows: int) -> None:
        super().__init__()
        self.num_parts = group.size
        self._first, self._num_rows = group.index * num_rows, num_rows
        self._sum, self._max = transport().all_reduce(group), transport().all_reduce_max(group)
        self._spread = ops.MatMul()

    def log_softmax(self, logits_CV: Tensor) -> Tensor:
        """As of the whole vocabulary; a logsumexp is spread over the rows by a product, see kernels/products.py."""
        greatest_C = self._max(logits_CV.max(axis=-1))
        ones_1V = ops.ones((1, self._num_rows), ms.float32)
        shifted_CV = logits_CV - self._spread(greatest_C.reshape(-1, 1), ones_1V)
        sums_C1 = self._spread(ops.exp(shifted_CV), ops.ones((self._num_rows, 1), ms.float32))
        return shifted_CV - self._spread(ops.log(self._sum(sums_C1)), ones_1V)

    def rows(self, labels_C: Tensor) -> Tensor:
        return ops.clamp(labels_C - self._first, 0, self._num_rows - 1)

    def is_here(self, labels_C: Tensor) -> Tensor:
        local_C = labels_C - self._first
        return ops.logical_and(local_C >= 0, local_C < self._num_rows).astype(ms.float32)

    def total(self, x_C: Tensor) -> Tensor:
        return self._sum(x_C)
