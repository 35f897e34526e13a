"""Functions of the native library as MindSpore operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from llama31_core.kernels.native.library import load_library

_FORMATS = {
    ms.int32: DataType.I32_Default,
    ms.float32: DataType.F32_Default,
}


def native_operator(
    function: str,
    inputs: Sequence[ms.Type],
    num_outputs: int,
    *,
    out_shape: Callable[..., Any],
    out_dtype: Callable[..., Any] | ms.Type = ms.float32,
) -> ops.Custom:
    """An operator with outputs in float32.

    Args:
        function: of the library.
        inputs: their types.
        out_shape: gives the outputs' shapes.
        out_dtype: the same for types.

    Raises:
        NativeKernelsError: not on this machine.
    """
    info = CustomRegOp()
    for index in range(len(inputs)):
        info = info.input(index, f"x{index}")
    for index in range(num_outputs):
        info = info.output(index, f"y{index}")
    formats = [*(_FORMATS[dtype] for dtype in inputs), *[DataType.F32_Default] * num_outputs]
    return ops.Custom(
        f"{load_library()}:{function}",
        out_shape=out_shape,
        out_dtype=out_dtype,
        func_type="aot",
        reg_info=info.dtype_format(*formats).target("CPU").get_op_info(),
    )
