"""The native products of training against NumPy in float64: values and gradients, sizes that no part divides."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from llama31_core.training.native_products import NativeProducts

pytestmark = pytest.mark.usefixtures("native_kernels")


class _Linear(nn.Cell):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self._multiply = NativeProducts().linear

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._multiply(x, weight)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [((1, 1), 5, 3), ((1, 7), 100, 33), ((2, 300), 96, 257), ((3, 130), 576, 96), ((2, 512), 64, 1000)],
)
def test_products_and_their_gradients_are_those_of_numpy(rows: tuple[int, int], inputs: int, outputs: int) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    rng, cell = np.random.default_rng(0), _Linear()
    x, weight, d_out = (
        rng.normal(size=shape).astype(np.float32) for shape in ((*rows, inputs), (outputs, inputs), (*rows, outputs))
    )
    out = cell(Tensor(x), Tensor(weight)).asnumpy()
    differentiate = ops.GradOperation(get_all=True, sens_param=True)(cell)
    d_x, d_weight = (found.asnumpy() for found in differentiate(Tensor(x), Tensor(weight), Tensor(d_out)))
    x64, weight64, d_out64 = (array.astype(np.float64) for array in (x, weight, d_out))
    wanted = (x64 @ weight64.T, d_out64 @ weight64, np.einsum("btn,btk->nk", d_out64, x64))
    for found, exact in zip((out, d_x, d_weight), wanted, strict=True):
        assert found.shape == exact.shape
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())
