"""LoRA in training (Hu et al. 2021): frozen weights with a trained low-rank change beside each adapted projection.

A projection gives `x W^T + scale * x A^T B^T`, with A (rank, in_features), B (out_features, rank) and scale = alpha /
rank. In TrainedWeights the two matrices of a weight `NAME.weight` are `NAME.lora_a` and `NAME.lora_b`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer

from llama31_core import kernels
from llama31_core.checkpoint.names import spell
from llama31_core.errors import ConfigError
from llama31_core.lora.adapter import Adapter
from llama31_core.lora.table import MODULES
from llama31_core.model.layers import Layers
from llama31_core.model.linear import Linear

A, B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class Lora:
    """What is adapted, and how.

    Attributes:
        modules: projections of every layer, as `Layers.linear` calls them.
        rank: columns of B.
        alpha: the change is scaled by alpha / rank.
    """

    modules: tuple[str, ...]
    rank: int
    alpha: float


def adapted_modules(targets: str | Sequence[str], n_layers: int) -> tuple[str, ...]:
    """The projections that `targets` names, by MindFormers' names or HF's: ends of names, or one regular expression.

    All layers share their graphs, so a projection is adapted in all of them or in none.

    Raises:
        ConfigError: an expression that is none, names nothing, or names a projection of some layers alone.
    """
    matches = _matcher(targets)
    found = []
    for module in MODULES:
        names = [f"model.layers.{i}.{module}.weight" for i in range(n_layers)]
        spellings = [(n.removesuffix(".weight"), spell(n, "hf").removesuffix(".weight")) for n in names]
        hits = [any(map(matches, both)) for both in spellings]
        if any(hits) and not all(hits):
            raise ConfigError(
                f"pet_config.target_modules {targets!r} names {module} of {sum(hits)} of {n_layers} layers; "
                "name it in all of them"
            )
        found += [module] if hits[0] else []
    if not found:
        known = ", ".join(f"{module} ({_hf_module(module)})" for module in MODULES)
        raise ConfigError(f"pet_config.target_modules {targets!r} names no projection; there are {known}")
    return tuple(found)


def _matcher(targets: str | Sequence[str]) -> Callable[[str], bool]:
    if not isinstance(targets, str):
        return lambda name: any(name == target or name.endswith(f".{target}") for target in targets)
    if targets == "all-linear":
        return lambda name: True
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ConfigError(f"pet_config.target_modules {targets!r} is no regular expression: {error}") from error
    return lambda name: pattern.fullmatch(name) is not None


def _hf_module(module: str) -> str:
    """`q_proj` for `attention.wq`."""
    return spell(f"model.layers.0.{module}.weight", "hf").split(".")[-2]


class LoraProjection(Linear):
    """A frozen matrix and its trained change."""

    def __init__(self, in_features: int, out_features: int, lora: Lora) -> None:
        super().__init__(in_features, out_features)
        self.weight.requires_grad = False
        self.lora_a = Parameter(initializer("zeros", (lora.rank, in_features), ms.float32))
        self.lora_b = Parameter(initializer("zeros", (out_features, lora.rank), ms.float32))
        self._scale = lora.alpha / lora.rank

    def construct(self, x: Tensor) -> Tensor:
        """Map x of shape (..., in_features) to (..., out_features)."""
        change = kernels.linear(kernels.linear(x, self.lora_a) * self._scale, self.lora_b)
        return kernels.linear(x, self.weight) + change


class LoraTrainedLayers(Layers):
    """Layers of which the changes alone are trained."""

    def __init__(self, lora: Lora) -> None:
        super().__init__()
        self._lora = lora

    def linear(self, name: str, in_features: int, out_features: int) -> nn.Cell:
        """A projection with a change, if it is adapted."""
        if name in self._lora.modules:
            return LoraProjection(in_features, out_features, self._lora)
        return _frozen(super().linear(name, in_features, out_features))

    def embedding(self, vocab_size: int, dim: int) -> nn.Cell:
        """A frozen embedding."""
        return _frozen(super().embedding(vocab_size, dim))

    def norm(self, dim: int, eps: float) -> nn.Cell:
        """A frozen norm."""
        return _frozen(super().norm(dim, eps))


def _frozen(cell: nn.Cell) -> nn.Cell:
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
    return cell


def is_change(name: str) -> bool:
    """Whether a name is that of a change's matrix, which no checkpoint of the model has."""
    return name.endswith((A, B))


def first_values(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """A uniform within 1 / sqrt(in_features), B zero, so that training begins at the model as it is.

    The distribution is peft's (`kaiming_uniform_` with a = sqrt(5)); the numbers follow from seed and name.
    """
    if name.endswith(B):
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(shape[1])
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def adapter_values(adapter: Adapter, lora: Lora, name: str) -> npt.NDArray[np.generic]:
    """A matrix of a saved adapter.

    Raises:
        ConfigError: the adapter is of another rank, alpha or set of modules.
    """
    change = adapter.changes.get(name[: name.rindex(".")] + ".weight")
    if change is None or change.rank != lora.rank or change.scale != lora.alpha / lora.rank:
        raise ConfigError(f"{adapter.source} does not have {name} as model.model_config.pet_config says; set it back")
    return change.a if name.endswith(A) else change.b


def peft_config(lora: Lora, base_model: str) -> dict[str, object]:
    """adapter_config.json (peft `LoraConfig`)."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [_hf_module(module) for module in lora.modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def peft_name(name: str) -> str:
    """What adapter_model.safetensors calls a change's matrix."""
    module, side = name.rsplit(".", 1)
    hf = spell(f"{module}.weight", "hf").removesuffix(".weight")
    return f"base_model.model.{hf}.lora_{side[-1].upper()}.weight"


def merged(tensors: Mapping[str, Tensor], name: str, lora: Lora | None) -> Tensor:
    """A weight with its change added, or as it is if it has none."""
    stem = name.removesuffix(".weight")
    if lora is None or stem + A not in tensors:
        return tensors[name]
    a, b = tensors[stem + A].asnumpy(), tensors[stem + B].asnumpy()
    return Tensor(tensors[name].asnumpy() + np.float32(lora.alpha / lora.rank) * (b @ a))
