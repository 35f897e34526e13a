"""LoRA adapters in PEFT's format: a directory in, the low-rank change of each weight out.

A layer's weight becomes W + scale * B A, with A (rank, in_features), B (out_features, rank) and scale = alpha / rank,
or alpha / sqrt(rank) for rank-stabilised LoRA (peft `tuners/lora/layer.py`, `get_delta_weight`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.checkpoint.names import canonical_name
from llama31_core.checkpoint.safetensors_format import parse_safetensors
from llama31_core.checkpoint.stored import OpenFile, TensorFiles
from llama31_core.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "a", ".lora_B.weight": "b"}
# Forms of adapter that change the formula, with the value that means "not used" and why another one is refused.
_PLAIN: dict[str, tuple[Any, str]] = {
    "peft_type": ("LORA", "it is another method"),
    "modules_to_save": (None, "it replaces whole weights, which several adapters beside one base cannot; merge it"),
    "bias": ("none", "Llama's layers have none"),
    "fan_in_fan_out": (False, "Llama's weights are (out, in)"),
    "use_dora": (False, "it scales the base weights too"),
    "use_qalora": (False, "it pools the input"),
    "use_bdlora": (None, "its matrices are block-diagonal"),
    "lora_bias": (False, "Llama's layers have none"),
    "layer_replication": (None, "it makes another architecture"),
    "trainable_token_indices": (None, "it replaces rows of the embedding"),
    "target_parameters": (None, "Llama has none beside its layers"),
    "alora_invocation_tokens": (None, "it depends on the text"),
    "arrow_config": (None, "it routes between adapters"),
    "kasa_config": (None, "it scales by singular values"),
    "monteclora_config": (None, "it draws the weights at random"),
    "velora_config": (None, "it projects the input"),
}


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: scale * b @ a, in float32; a (rank, in_features), b (out_features, rank)."""

    a: Array
    b: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """That of the weight."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        source: the directory it came from.
        changes: by the canonical name of the weight that is changed.
        digest: of all that it computes; two adapters of one digest give the same results.
    """

    source: Path
    changes: Mapping[str, LowRank]
    digest: bytes

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(change.rank for change in self.changes.values())


def read_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory that PEFT's `save_pretrained` made.

    Raises:
        CheckpointError: no PEFT LoRA adapter, a form other than plain LoRA, matrices that do not fit each other or the
            configuration, numbers that are not finite.
    """
    directory = Path(directory)
    config = _Config(directory / CONFIG_NAME)
    file = OpenFile(directory / WEIGHTS_NAME)
    try:
        files = TensorFiles(directory, parse_safetensors(file)[0], [file])
        changes = {
            _canonical(directory, module): _read_change(files, config, module, stored_names)
            for module, stored_names in _modules(files).items()
        }
    finally:
        file.close()
    if not changes:
        raise CheckpointError(f"{directory / WEIGHTS_NAME} holds no LoRA matrices")
    return Adapter(directory, changes, _digest(changes))


def _modules(files: TensorFiles) -> dict[str, dict[str, str]]:
    """Module as HF spells it -> side ("a", "b") -> the stored tensor's name."""
    sides: dict[str, dict[str, str]] = {}
    for stored in files.tensors:
        suffix = next((end for end in _SIDES if stored.endswith(end)), None)
        if suffix is None or not stored.startswith(PREFIX):
            raise CheckpointError(f"{files.source}: tensor {stored!r} is no LoRA matrix of a linear layer")
        module = stored.removeprefix(PREFIX).removesuffix(suffix)
        sides.setdefault(module, {})[_SIDES[suffix]] = stored
    return sides


def _canonical(directory: Path, module: str) -> str:
    canonical = canonical_name(f"{module}.weight", "hf")
    if canonical is None:
        raise CheckpointError(f"{directory} changes {module}.weight, which no Llama model has")
    return canonical


def _read_change(files: TensorFiles, config: _Config, module: str, stored_names: dict[str, str]) -> LowRank:
    source = files.source
    if set(stored_names) != {"a", "b"}:
        raise CheckpointError(f"{source} has just one of lora_A and lora_B for {module}")
    a, b = (files.read_slice(stored_names[side], ()).astype(np.float32) for side in ("a", "b"))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(f"{source}: lora_A {a.shape} and lora_B {b.shape} of {module} do not fit each other")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CheckpointError(f"{source}: the matrices of {module} hold numbers that are not finite")
    config.check_target(module)
    rank = config.rank(module)
    if rank != a.shape[0]:
        raise CheckpointError(f"{source}: {module} has rank {a.shape[0]}, {CONFIG_NAME} says {rank}")
    alpha = config.alpha(module)
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.rank_stabilised else rank))


class _Config:
    """adapter_config.json: what it says of each module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = read_json_object(path)
        for key, (plain, reason) in _PLAIN.items():
            value = self._values.get(key, plain)
            if value != plain and not (plain in (None, False) and not value):
                raise CheckpointError(f"{path}: {key} is {value!r}, only plain LoRA ({plain!r}) is taken: {reason}")

    @property
    def rank_stabilised(self) -> bool:
        return bool(self._values.get("use_rslora"))

    def rank(self, module: str) -> int:
        value = self._pattern("rank_pattern", module, self._values.get("r"))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: r of {module} is {value!r}, expected an integer >= 1")
        return value

    def alpha(self, module: str) -> float:
        value = self._pattern("alpha_pattern", module, self._values.get("lora_alpha"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: lora_alpha of {module} is {value!r}, expected a number")
        return float(value)

    def check_target(self, module: str) -> None:
        """PEFT leaves out, without a word, what is stored for a module that `target_modules` does not name."""
        targets = self._values.get("target_modules")
        if isinstance(targets, str):
            named = targets == "all-linear" or self._matches(targets, module, re.fullmatch)
        elif isinstance(targets, list):
            named = any(module == target or module.endswith(f".{target}") for target in targets)
        else:
            named = targets is None
        if not named:
            raise CheckpointError(f"{self.path}: target_modules is {targets!r}, but there are matrices for {module}")

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name (peft `get_pattern_key`)."""
        patterns = self._values.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.path}: {key} is {patterns!r}, expected an object")
        for pattern, value in patterns.items():
            if self._matches(rf"(.*\.)?({pattern})$", module, re.match):
                return value
        return default

    def _matches(self, pattern: str, module: str, match: Any) -> bool:
        try:
            return match(pattern, module) is not None
        except re.error as error:
            raise CheckpointError(f"{self.path}: {pattern!r} is no regular expression: {error}") from error


def _digest(changes: Mapping[str, LowRank]) -> bytes:
    content = blake2b(digest_size=16)
    for name in sorted(changes):
        change = changes[name]
        content.update(f"{name} {change.a.shape} {change.b.shape} {change.scale!r}".encode())
        content.update(change.a.tobytes())
        content.update(change.b.tobytes())
    return content.digest()
