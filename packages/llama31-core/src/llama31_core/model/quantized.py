"""Layers over weights of 8 or 4 bits, as checkpoint/quantized.py has them: for prediction, without gradients."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Zero, initializer

from llama31_core import kernels
from llama31_core.checkpoint.quantized import num_groups
from llama31_core.config import Quantization
from llama31_core.model.layers import Layers


class _Quantized(nn.Cell):  # type: ignore[misc]
    """A matrix (rows, columns)."""

    def __init__(self, rows: int, columns: int, bits: int, group_size: int) -> None:
        super().__init__()
        kernel_set = kernels.active()
        shape, dtype = ((rows, columns // 2), kernel_set.packed_dtype()) if bits == 4 else ((rows, columns), ms.int8)
        groups = (rows, num_groups(columns, group_size))
        self.bits = bits
        self.group_size = group_size
        self.qweight = Parameter(initializer(Zero(), shape, dtype), requires_grad=False)
        self.scales = Parameter(initializer(Zero(), groups, ms.float32), requires_grad=False)
        self.biases = Parameter(initializer(Zero(), groups, ms.float32), requires_grad=False)
        self.linear = kernel_set.quantized_linear


class QuantizedLinear(_Quantized):
    """`x @ weight.T` for a weight (out_features, in_features)."""

    def construct(self, x: Tensor) -> Tensor:
        """Map x of shape (..., in_features) to (..., out_features)."""
        return self.linear(x, self.qweight, self.scales, self.biases, self.bits, self.group_size)


class QuantizedEmbedding(_Quantized):
    """Token ids to vectors, from a table of 8 bits."""

    def construct(self, tokens: Tensor) -> Tensor:
        """Vectors of shape (..., dim), float32, for ids of shape (...)."""
        rows = tokens.reshape(-1)
        numbers, scales = ops.gather(self.qweight, rows, 0), ops.gather(self.scales, rows, 0)
        biases = ops.gather(self.biases, rows, 0)
        return kernels.dequantize(numbers, scales, biases, self.bits, self.group_size).reshape((*tokens.shape, -1))

    def project(self, hidden: Tensor) -> Tensor:
        """See TokenEmbedding."""
        return self.linear(hidden, self.qweight, self.scales, self.biases, self.bits, self.group_size)


class QuantizedLayers(Layers):
    """Layers that hold quantised matrices; norms are float32."""

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def linear(self, name: str, in_features: int, out_features: int) -> nn.Cell:
        """See Layers."""
        bits = 8 if name == "lm_head" else self.quantization.bits
        return QuantizedLinear(out_features, in_features, bits, self.quantization.group_size)

    def embedding(self, vocab_size: int, dim: int) -> nn.Cell:
        """See Layers."""
        return QuantizedEmbedding(vocab_size, dim, 8, self.quantization.group_size)
