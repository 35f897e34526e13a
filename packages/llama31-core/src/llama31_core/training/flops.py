"""How many floating-point operations training needs, from the configuration alone. One multiply-add is two."""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.checkpoint.names import split_layer
from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig


@dataclass(frozen=True)
class StepFlops:
    """Operations of a forward and backward pass.

    Attributes:
        per_token: in the layers, without attention's products of queries with keys.
        per_label: in the output matrix, which is applied to tokens with a label alone.
        per_pair: for each pair of a query and a key that it sees.
    """

    per_token: float
    per_label: float
    per_pair: float

    @classmethod
    def of(cls, config: ModelConfig, *, trains_weights: bool = True) -> StepFlops:
        """Of a model (Chowdhery et al. 2022, appendix B: 6 a weight and token, 12 a head's element and pair).

        A third of what a weight takes is its own gradient, which frozen weights do not need; the changes of LoRA,
        some percent of the weights, are not counted.
        """
        shapes = parameter_shapes(config)
        in_layers = sum(s[0] * s[1] for name, s in shapes.items() if split_layer(name)[1] is not None and len(s) > 1)
        each = 6 if trains_weights else 4
        pairs = 12.0 * config.n_layers * config.n_heads * config.head_dim
        return cls(float(each * in_layers), float(each * config.vocab_size * config.dim), pairs)

    def count(self, num_tokens: int, num_labels: float, num_pairs: float) -> float:
        """Of a batch."""
        return self.per_token * num_tokens + self.per_label * num_labels + self.per_pair * num_pairs
