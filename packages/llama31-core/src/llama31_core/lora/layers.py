"""Projections with adapters beside their weights: each row of a batch is computed with its own, in one graph.

The matrices of all slots are stacked: A as (S * R, I), B as (O, S * R), for S slots of rank R, padded with zeros. A row
goes through all of A; of the result only its own slot's R numbers are kept, and the others are zero in the product with
B. That is plain matrix products whatever the rows ask for, so loading, unloading and mixing adapters compiles nothing.
Shapes: B rows, T tokens of each, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llama31_core import kernels
from llama31_core.lora.adapter import LowRank
from llama31_core.lora.table import BASE_SLOT, MODULES
from llama31_core.model.layers import Layers
from llama31_core.model.linear import Linear

_PREFIX = "lora_"


class LoraLinear(Linear):
    """`x @ weight.T`, and for rows with an adapter `+ x @ A.T @ B.T` with the matrices of their slot.

    Args:
        in_features, out_features: of the projection.
        width: S * R.
        lora_rows: (rows, S * R), true where a row of the batch has its slot; one for all layers.
    """

    def __init__(
        self, in_features: int, out_features: int, width: int, lora_rows: Parameter, dtype: ms.Type = ms.float32
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.lora_a = Parameter(Tensor(np.zeros((width, in_features), np.float32), dtype), requires_grad=False)
        self.lora_b = Parameter(Tensor(np.zeros((out_features, width), np.float32), dtype), requires_grad=False)
        self.lora_rows = lora_rows

    def construct(self, x: Tensor) -> Tensor:
        """Map x of shape (B, T, I) to (B, T, O)."""
        own_B1W = self.lora_rows[: x.shape[0]][:, None]
        # Chosen, not multiplied by zero: what is not finite in one adapter's product must not reach another's rows.
        inner_BTW = kernels.linear(x, self.lora_a)
        inner_BTW = ops.select(own_B1W, inner_BTW, ops.zeros_like(inner_BTW))
        return kernels.linear(x, self.weight) + kernels.linear(inner_BTW, self.lora_b)


class LoraLayers(Layers):
    """Layers whose projections have slots for adapters; an `AdapterStore`.

    Args:
        max_loras: slots beside that of the base model.
        max_lora_rank: rank of each.
        max_rows: rows of a batch.
        param_dtype: see Layers.
    """

    def __init__(self, max_loras: int, max_lora_rank: int, max_rows: int, param_dtype: ms.Type = ms.float32) -> None:
        super().__init__(param_dtype)
        self._rank = max_lora_rank
        self._rows = np.zeros((max_rows, max_loras * max_lora_rank), np.bool_)
        self._chosen: list[int] = []
        self._parameter = Parameter(Tensor(self._rows), name=f"{_PREFIX}rows", requires_grad=False)
        self._linears: dict[str, LoraLinear] = {}
        self._counts: dict[str, int] = dict.fromkeys(MODULES, 0)

    def linear(self, name: str, in_features: int, out_features: int) -> nn.Cell:
        """A projection with slots, if adapters can change it; layers are built in order."""
        if name not in self._counts:
            return super().linear(name, in_features, out_features)
        cell = LoraLinear(in_features, out_features, self._rows.shape[1], self._parameter, self.param_dtype)
        self._linears[f"model.layers.{self._counts[name]}.{name}.weight"] = cell
        self._counts[name] += 1
        return cell

    def write(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        """Make these the changes of a slot; weights that are not named are not changed."""
        first = (slot - 1) * self._rank
        for name, cell in self._linears.items():
            a, b = (side.astype(ms.float32).asnumpy().copy() for side in (cell.lora_a, cell.lora_b))
            a[first : first + self._rank] = 0
            b[:, first : first + self._rank] = 0
            if name in changes:
                change = changes[name]
                a[first : first + change.rank] = change.a
                b[:, first : first + change.rank] = change.b * np.float32(change.scale)
            cell.lora_a.set_data(Tensor(a, self.param_dtype))
            cell.lora_b.set_data(Tensor(b, self.param_dtype))

    def select(self, slots_B: Sequence[int]) -> None:
        """Say which adapter each row of the next batch has; `BASE_SLOT` for none."""
        if list(slots_B) == self._chosen:
            return
        self._rows[:] = False
        for row, slot in enumerate(slots_B):
            if slot != BASE_SLOT:
                self._rows[row, (slot - 1) * self._rank : slot * self._rank] = True
        self._parameter.set_data(Tensor(self._rows))
        self._chosen = list(slots_B)


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of the model is of adapters, and in no checkpoint."""
    return name.rpartition(".")[2].startswith(_PREFIX)
