"""The difference of two checkpoints as a LoRA adapter: base and tuned weights in, a PEFT directory out.

Each matrix's difference is cut to its greatest singular values by the randomised range finder of Halko, Martinsson and
Tropp (2011, algorithms 4.4 and 5.1): exact, up to rounding, where the difference has no more than the rank asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama31_core.checkpoint.dtypes import Array, dtype_of
from llama31_core.checkpoint.names import spell
from llama31_core.checkpoint.reader import Weights
from llama31_core.checkpoint.staging import staged_directory
from llama31_core.checkpoint.writer import TensorSpec, write_safetensors
from llama31_core.errors import CheckpointError
from llama31_core.lora.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Extraction:
    """What `extract_lora` wrote.

    Attributes:
        num_matrices: weights that differ, and are in the adapter.
        residual: the greatest |difference - b @ a| of any element.
        largest: the greatest |difference| of any element, for scale.
    """

    num_matrices: int
    residual: float
    largest: float


def extract_lora(
    base: Weights,
    tuned: Weights,
    destination: Path,
    *,
    rank: int,
    overwrite: bool = False,
    on_tensor: Callable[[str], object] = lambda name: None,
) -> Extraction:
    """Write `tuned - base` as an adapter of at most `rank`.

    Raises:
        CheckpointError: different tensors or shapes, a difference in something other than a layer's matrices, no
            difference at all, or a destination that exists.
    """
    if rank < 1:
        raise CheckpointError(f"rank {rank} must be at least 1")
    if set(base.names()) != set(tuned.names()):
        odd = sorted(set(base.names()) ^ set(tuned.names()))[:10]
        raise CheckpointError(f"{base.source} and {tuned.source} have different tensors: {', '.join(odd)}")
    matrices: dict[str, Array] = {}
    modules: set[str] = set()
    residual = largest = 0.0
    for name in base.names():
        on_tensor(name)
        difference = _difference(base, tuned, name)
        if not difference.any():
            continue
        module = spell(name, "hf").removesuffix(".weight")
        if difference.ndim != 2 or ".layers." not in module:
            raise CheckpointError(f"{name} differs too, and LoRA changes the matrices of layers only")
        b, a = factor(difference, rank)
        residual = max(residual, float(np.abs(difference - b @ a).max()))
        largest = max(largest, float(np.abs(difference).max()))
        matrices[f"{PREFIX}{module}.lora_A.weight"] = a
        matrices[f"{PREFIX}{module}.lora_B.weight"] = b
        modules.add(module.rpartition(".")[2])
    if not matrices:
        raise CheckpointError(f"{base.source} and {tuned.source} do not differ; there is nothing to extract")
    _write(destination, matrices, sorted(modules), rank, overwrite)
    return Extraction(len(matrices) // 2, residual, largest)


def _difference(base: Weights, tuned: Weights, name: str) -> Array:
    if base.shape(name) != tuned.shape(name):
        raise CheckpointError(
            f"{name} is {base.shape(name)} in {base.source} and {tuned.shape(name)} in {tuned.source}"
        )
    return tuned.read_slice(name, ()).astype(np.float32) - base.read_slice(name, ()).astype(np.float32)


def factor(matrix: Array, rank: int) -> tuple[Array, Array]:
    """b (rows, rank) and a (rank, columns) whose product is near `matrix`; zero columns where its rank is lower."""
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    probe = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(np.float32)
    basis, _ = np.linalg.qr(matrix @ probe)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    b = np.zeros((matrix.shape[0], rank), np.float32)
    a = np.zeros((rank, matrix.shape[1]), np.float32)
    b[:, :kept] = (basis @ left[:, :kept]) * root
    a[:kept] = root[:, None] * right[:kept]
    return b, a


def _write(destination: Path, matrices: dict[str, Array], modules: list[str], rank: int, overwrite: bool) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    specs = [TensorSpec(name, matrix.shape, dtype_of("fp32")) for name, matrix in matrices.items()]

    def chunks(spec: TensorSpec) -> Iterator[Array]:
        yield matrices[spec.name]

    with staged_directory(destination, overwrite=overwrite) as part:
        write_safetensors(part / WEIGHTS_NAME, specs, chunks, metadata={"format": "pt"})
        (part / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
