"""Models with random weights for the tests of this package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor

from llama31_core.checkpoint import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.inference.runner import GraphRunner
from llama31_core.model import Llama, PagedAttention


@pytest.fixture
def random_weights() -> Callable[..., dict[str, npt.NDArray[np.float32]]]:
    """Weights of every parameter, norms near 1, the rest of a size at which logits differ by a few units."""

    def build(config: ModelConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
        rng = np.random.default_rng(seed)
        weights = {}
        for name, shape in parameter_shapes(config).items():
            centre, spread = (1.0, 0.1) if len(shape) == 1 else (0.0, 1.0 / np.sqrt(shape[-1]))
            weights[name] = rng.normal(centre, spread, shape).astype(np.float32)
        return weights

    return build


@pytest.fixture
def build_runner() -> Callable[..., GraphRunner]:
    """A compiled model with given weights over a small cache."""

    def build(
        config: ModelConfig, weights: dict[str, npt.NDArray[np.float32]], num_blocks: int = 64, block_size: int = 8
    ) -> GraphRunner:
        llama = Llama(config, lambda: PagedAttention(config, num_blocks, block_size))
        for name, parameter in llama.parameters_and_names():
            if not name.endswith("_cache"):
                parameter.set_data(Tensor(weights[name]))
        return GraphRunner(llama, num_blocks, block_size)

    return build
