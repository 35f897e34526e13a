"""Number types: what a device computes when a run file asks for something, and float16 on a CPU against float32."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.model import CausalAttention, Llama
from llama31_core.model.layers import Layers
from llama31_core.precision import Precision


def test_the_device_decides_what_is_possible() -> None:
    assert Precision.on("CPU", param="bfloat16", compute="bfloat16") == Precision("float32", "float32")
    assert Precision.on("Ascend") == Precision("bfloat16", "bfloat16")
    assert Precision.on("Ascend", param="float32", compute="float16") == Precision("float32", "float16")
    with pytest.raises(ConfigError, match="compute_dtype is 'float32'"):
        Precision.on("Ascend", compute="float32")


@pytest.mark.parametrize("param_dtype", [ms.float32, ms.float16], ids=["float32 weights", "float16 weights"])
def test_products_in_sixteen_bits_stay_near(
    param_dtype: ms.Type, random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]]
) -> None:
    config = ModelConfig.preset("tiny")
    weights = random_weights(config)
    tokens = Tensor(np.random.default_rng(0).integers(0, config.vocab_size, (1, 40)).astype(np.int32))
    positions = Tensor(np.arange(40, dtype=np.int32)[None])
    logits = []
    for layers, compute_dtype in ((Layers(), ms.float32), (Layers(param_dtype), ms.float16)):
        model = Llama(config, CausalAttention, layers, compute_dtype)
        for name, parameter in model.parameters_and_names():
            parameter.set_data(Tensor(weights[name], parameter.dtype))
        result = model(tokens, positions, Tensor(np.zeros((1, 40), np.int32)))
        assert result.dtype == ms.float32
        logits.append(result.asnumpy())
    # float16 has 11 bits; errors of 5e-4 per product add up over some ten of them.
    difference = np.abs(logits[0] - logits[1]).max()
    assert 0 < difference < 1e-2 * np.abs(logits[0]).max()
