"""LoRA adapters in PEFT's format: a directory in, its low-rank matrices out; and base weights with one merged in.

A layer's weight becomes W + scale * B A, with A (rank, in_features), B (out_features, rank) and scale = alpha / rank,
or alpha / sqrt(rank) for rank-stabilised LoRA (peft `tuners/lora/layer.py`, `get_delta_weight`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.checkpoint.names import canonical_name
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.safetensors_format import parse_safetensors
from llama31_core.checkpoint.stored import OpenFile, TensorFiles, resolve_index
from llama31_core.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "a", ".lora_B.weight": "b"}
# Forms of adapter that change the formula; each must have the value that means it is not used.
_PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None}


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: scale * b @ a, in float32."""

    a: Array
    b: Array
    scale: float


def read_adapter(directory: Path) -> dict[str, LowRank]:
    """The adapter's matrices by the canonical name of the weight they change.

    Raises:
        CheckpointError: no PEFT LoRA adapter, a form other than plain LoRA, or matrices that do not fit each other.
    """
    config = _read_config(directory / CONFIG_NAME)
    file = OpenFile(directory / WEIGHTS_NAME)
    files = TensorFiles(directory, parse_safetensors(file)[0], [file])
    sides: dict[str, dict[str, str]] = {}
    for stored in files.tensors:
        module, side = _split_name(directory, stored)
        sides.setdefault(module, {})[side] = stored
    result = {}
    for module, stored_names in sides.items():
        canonical = canonical_name(f"{module}.weight", "hf")
        if canonical is None:
            raise CheckpointError(f"{directory} changes {module}.weight, which no Llama model has")
        if set(stored_names) != {"a", "b"}:
            raise CheckpointError(f"{directory} has just one of lora_A and lora_B for {module}")
        a, b = (files.read_slice(stored_names[side], ()).astype(np.float32) for side in ("a", "b"))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise CheckpointError(
                f"{directory}: lora_A {a.shape} and lora_B {b.shape} of {module} do not fit each other"
            )
        result[canonical] = LowRank(a, b, _scale(directory, config, module, a.shape[0]))
    file.close()
    if not result:
        raise CheckpointError(f"{directory / WEIGHTS_NAME} holds no LoRA matrices")
    return result


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object(path)
    for key, plain in _PLAIN.items():
        if (value := config.get(key, plain)) != plain:
            raise CheckpointError(f"{path}: {key} is {value!r}, only plain LoRA ({plain!r}) can be merged")
    return config


def _split_name(directory: Path, stored: str) -> tuple[str, str]:
    """The module's name as HF spells it, and which of the two matrices this is."""
    for suffix, side in _SIDES.items():
        if stored.startswith(PREFIX) and stored.endswith(suffix):
            return stored.removeprefix(PREFIX).removesuffix(suffix), side
    raise CheckpointError(f"{directory}: tensor {stored!r} is no LoRA matrix of a linear layer")


def _scale(directory: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            # PEFT lets a pattern match the end of a module's name; patterns are names there in practice.
            if re.search(rf"(^|\.){re.escape(pattern)}$", module):
                alpha = value
                break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{directory / CONFIG_NAME}: lora_alpha of {module} is {alpha!r}, expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class MergedWeights:
    """Base weights with an adapter merged in, as `llama31_core.checkpoint.Weights`.

    A changed tensor reads as float32, so that writing it rounds once; `dtype` is the base's, which is what is written.
    """

    def __init__(self, base: Weights, adapter: Mapping[str, LowRank], source: Path) -> None:
        self.source = base.source
        self._base = base
        self._adapter = adapter
        names = set(base.names())
        for name, change in adapter.items():
            if name not in names:
                raise CheckpointError(f"{source} changes {name}, which {base.source} does not have")
            shape = (change.b.shape[0], change.a.shape[1])
            if base.shape(name) != shape:
                raise CheckpointError(f"{source} changes {name} as {shape}, in {base.source} it is {base.shape(name)}")

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> str:
        return self._base.dtype(name)

    def read_slice(self, name: str, index: Sequence[slice]) -> Array:
        base = self._base.read_slice(name, index)
        change = self._adapter.get(name)
        if change is None:
            return base
        rows, columns = (slice(*bounds) for bounds in resolve_index(self.shape(name), index))
        delta: Array = (change.b[rows] @ change.a[:, columns]) * np.float32(change.scale)
        return base.astype(np.float32) + delta
