"""The weights of a model in training, and the one-layer model whose graphs compute with each layer's in turn.

A graph is compiled for one layer. To run it for another, its parameters are pointed at that layer's tensors, which
copies nothing: what the optimiser writes into a parameter is in the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Parameter, Tensor, nn
from mindspore.nn.utils import no_init_parameters

from llama31_core import kernels
from llama31_core.config import ModelConfig
from llama31_core.inference.runner import native_kernels_here
from llama31_core.model import Llama
from llama31_core.model.attention import AttentionCore
from llama31_core.model.layers import Layers
from llama31_core.precision import Precision
from llama31_core.training.native_products import NativeProducts
from llama31_core.training.native_rows import fuse_rows

_FIRST = "model.layers.0."
_FLOAT32 = Precision()


class TrainedWeights:
    """All weights by canonical name, as float32 tensors, behind a model of one layer.

    Args:
        config: the architecture.
        core: builds the layer's attention.
        layers: builds what holds weights; whole layers if None.
        precision: of what is computed; the weights are float32.
        held: names of the weights that are here, for a stage of a pipeline; all if None.

    Attributes:
        compute_dtype: of products and of what flows between layers.
        products: those of the native kernels, which the layer has; None where MindSpore's operator multiplies.
    """

    def __init__(
        self,
        config: ModelConfig,
        core: AttentionCore,
        layers: Layers | None = None,
        *,
        precision: Precision = _FLOAT32,
        held: Collection[str] | None = None,
    ) -> None:
        self.config, self.precision = config, precision
        self.compute_dtype: ms.Type = getattr(ms, precision.compute)
        is_cpu = ms.get_context("device_target") == "CPU"
        with no_init_parameters(), kernels.use("products") if is_cpu else nullcontext():
            self.template = Llama(config.model_copy(update={"n_layers": 1}), core, layers, self.compute_dtype)
        # If they cannot run, the attention has said why.
        has_native = precision == _FLOAT32 and native_kernels_here(warns=False)
        self.products = NativeProducts() if has_native else None
        if self.products is not None:
            fuse_rows(self.template)
            self.products.replace_in(self.template)
        self.block: nn.Cell = self.template.model.layers[0]
        self.block_parameters: dict[str, Parameter] = {}
        self.outer_parameters: dict[str, Parameter] = {}
        for name, parameter in self.template.parameters_and_names():
            if name.startswith(_FIRST):
                self.block_parameters[name] = parameter
            elif held is None or name in held:
                self.outer_parameters[name] = parameter
        first = next(iter(self.block_parameters))
        self.layer_indices: Sequence[int] = [
            index for index in range(config.n_layers) if held is None or layer_name(first, index) in held
        ]
        self.tensors: dict[str, Tensor] = {}

    @property
    def has_native_rows(self) -> bool:
        """Whether the native kernels compute what stands between products: where they multiply, too."""
        return self.products is not None

    def names(self) -> list[str]:
        """Canonical names of all weights here, the embedding first, in the order of layers."""
        names = [name for name in self.outer_parameters if name.startswith("model.tok_embeddings")]
        for index in self.layer_indices:
            names += [layer_name(name, index) for name in self.block_parameters]
        return names + [name for name in self.outer_parameters if name not in names]

    def is_trained(self, name: str) -> bool:
        """Whether a weight gets gradients."""
        return bool(self._parameter(name).requires_grad)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a weight."""
        return tuple(self._parameter(name).shape)

    def load(self, read: Callable[[str], npt.NDArray[np.generic]]) -> None:
        """Take every weight from `read(name)`."""
        for name in self.names():
            self.tensors[name] = Tensor(read(name).astype(np.float32))
        for name, parameter in self.outer_parameters.items():
            parameter.set_data(self.tensors[name])
        self.use_layer(self.layer_indices[0])

    def use_layer(self, index: int) -> None:
        """Point the template's layer at the weights of this one."""
        for name, parameter in self.block_parameters.items():
            parameter.set_data(self.tensors[layer_name(name, index)])

    def replace(self, name: str, tensor: Tensor) -> None:
        """Hold another tensor as this weight."""
        self.tensors[name] = tensor
        if name in self.outer_parameters:
            self.outer_parameters[name].set_data(tensor)

    def arrays(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Names and values, for saving."""
        for name in self.names():
            yield name, self.tensors[name].asnumpy()

    def _parameter(self, name: str) -> Parameter:
        known: Mapping[str, Parameter] = self.outer_parameters
        return known[name] if name in known else self.block_parameters[layer_name(name, 0)]


def layer_name(name: str, index: int) -> str:
    """The name of a layer's weight in layer `index`."""
    head, dot, rest = name.removeprefix("model.layers.").partition(".")
    return f"model.layers.{index}{dot}{rest}" if head.isdigit() else name
