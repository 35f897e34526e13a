"""The products of training by the native CPU kernels: `x weight^T` and both its gradients, in float32.

oneDNN multiplies, part by part, in the native kernels' threads (kernels/native/training_products.h). MindSpore's
operator is the oracle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, ops

from llama31_core.kernels.native.library import load_library
from llama31_core.kernels.native.operator import native_operator
from llama31_core.model import Llama
from llama31_core.model.linear import Linear


class NativeProducts:
    """The three products with a weight (N, K).

    Attributes:
        linear: x (..., K), weight -> (..., N), which has gradients.
        input_gradient: gradient of the result (..., N), weight -> that of x.
        weight_gradient: gradient of the result (..., N), x (..., K) -> that of the weight.
    """

    def __init__(self) -> None:
        # What MindSpore's wheel brings and has loaded itself; its C interface does not change.
        onednn = ctypes.CDLL(str(Path(ms.__file__).parent / "lib" / "libdnnl.so.3"))
        ctypes.CDLL(str(load_library())).Llama31SetSgemm(ctypes.cast(onednn.dnnl_sgemm, ctypes.c_void_p))
        self.linear = _product("Llama31TrainLinear", lambda x, weight: [*x[:-1], weight[0]])
        self.input_gradient = _product("Llama31TrainLinearInputGrad", lambda d_y, weight: [*d_y[:-1], weight[1]])
        self.weight_gradient = _product("Llama31TrainLinearWeightGrad", lambda d_y, x: [d_y[-1], x[-1]])
        input_gradient, weight_gradient = self.input_gradient, self.weight_gradient

        def gradients(x: Tensor, weight: Tensor, out: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
            return input_gradient(d_out, weight), weight_gradient(d_out, x)

        self.linear.bprop = gradients

    def replace_in(self, template: Llama) -> None:
        """Let a model's projections use them; everything is float32."""
        for _, cell in template.cells_and_names():
            if isinstance(cell, Linear):
                cell._multiply = self.linear


def _product(function: str, out_shape: Callable[..., list[int]]) -> ops.Custom:
    return native_operator(function, [ms.float32] * 2, 1, out_shape=out_shape, out_dtype=lambda a, b: a)
