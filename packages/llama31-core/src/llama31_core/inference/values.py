"""Values of a model's parameters for prediction: arrays in, tensors over the same memory out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from llama31_core.checkpoint.dtypes import BY_MINDSPORE, Array, array_of_lines


def set_value(parameter: ms.Parameter, values: Array) -> None:
    """Give a parameter values; those that have its type are neither copied nor brought to another one on the way."""
    if parameter.dtype == ms.qint4x2:  # the same bits with 8 taken off each number
        parameter.set_data(Tensor((values ^ np.uint8(0x88)).view(np.int8), dtype=ms.qint4x2))
    elif getattr(ms, values.dtype.name) == parameter.dtype:
        parameter.set_data(Tensor.from_numpy(values))
    else:
        parameter.set_data(Tensor.from_numpy(values.astype(np.float32)).astype(parameter.dtype))


def caches(model: nn.Cell) -> Iterator[ms.Parameter]:
    """The key and value caches of a model built with `PagedAttention`."""
    return (parameter for name, parameter in model.parameters_and_names() if is_cache(name))


def clear_caches(model: nn.Cell) -> None:
    """Give the caches zeros; one takes memory as it is written."""
    for cache in caches(model):
        set_value(cache, array_of_lines(cache.shape, numpy_dtype(cache), zeros=True))


def numpy_dtype(parameter: ms.Parameter) -> np.dtype[Any]:
    """NumPy's name of a parameter's type."""
    return BY_MINDSPORE[str(parameter.dtype)].numpy


def is_cache(name: str) -> bool:
    """Whether a parameter is a cache, which no checkpoint has."""
    return name.endswith("_cache")
