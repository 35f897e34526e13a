"""Meta's original checkpoints: a directory with `params.json` and `consolidated.NN.pth` in, weights and config out.

The files are tensor-parallel shards: column-parallel weights are joined by rows, row-parallel ones by columns, norms
are in every file (llama-models `models/llama3/model.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama31_ckpt.torch_format import Joined, TorchWeights, load_tensors
from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name, is_ignorable, rotary_heads
from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.errors import CheckpointError
from llama31_core.presets import PRESETS

PARAMS_NAME = "params.json"
_SHARD_PATTERN = "consolidated.[0-9][0-9].pth"
_SCALING_DEFAULTS = {"rope_scaling_factor": 8.0, "rope_high_freq_factor": 4.0}
_ROW_PARALLEL = (".attention.wo.weight", ".feed_forward.w2.weight")
_KNOWN_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip


def is_meta_directory(path: Path) -> bool:
    return path.is_dir() and any(path.glob("consolidated.*.pth"))


def open_meta(directory: Path) -> tuple[TorchWeights, ModelConfig, tuple[str, ...]]:
    """The weights and configuration of a Meta directory, and the entries that are no weights.

    Raises:
        CheckpointError: a missing shard or params.json, head counts that do not fit the tensors, shards that disagree.
        ConfigError: params.json describes no Llama of this architecture.
    """
    shard_paths = _shard_paths(directory)
    params = _read_params(directory / PARAMS_NAME)
    shards = [load_tensors(path) for path in shard_paths]
    names = list(shards[0])
    for path, shard in zip(shard_paths, shards, strict=True):
        if list(shard) != names:
            odd = sorted(set(names) ^ set(shard))[:10]
            raise CheckpointError(f"{path} and {shard_paths[0].name} hold different tensors: {', '.join(odd)}")
    ignored = tuple(name for name in names if is_ignorable(name))
    parts = {
        canonical_name(name, "meta") or name: tuple(shard[name] for shard in shards)
        for name in names
        if name not in ignored
    }
    for name, found in parts.items():
        if len({(tensor.dim(), tensor.dtype) for tensor in found}) > 1 or found[0].dim() not in (1, 2):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
            raise CheckpointError(f"{directory}: {name} has parts of shapes {shapes} in its shards")
    config = _read_config(directory / PARAMS_NAME, params, parts)
    expected = parameter_shapes(config)
    tensors = {name: _join(directory, name, found, expected.get(name), config) for name, found in parts.items()}
    return TorchWeights(directory, tensors), config, ignored


def _shard_paths(directory: Path) -> list[Path]:
    paths = sorted(directory.glob(_SHARD_PATTERN))
    expected = [directory / f"consolidated.{rank:02d}.pth" for rank in range(max(1, len(paths)))]
    if paths != expected:
        absent = next(path.name for path in expected if path not in paths)
        raise CheckpointError(f"{directory} has {len(paths)} shards and no {absent}; get the missing shard")
    return paths


def _read_params(path: Path) -> dict[str, Any]:
    params = read_json_object(path)
    unknown = sorted(set(params) - _KNOWN_PARAMS)
    if unknown:
        raise CheckpointError(
            f"{path}: {', '.join(unknown)} is nothing a text Llama has; this model cannot be converted"
        )
    return params


def _read_config(path: Path, params: dict[str, Any], parts: dict[str, tuple[Any, ...]]) -> ModelConfig:
    w1 = parts.get("model.layers.0.feed_forward.w1.weight")
    embedding = parts.get(EMBEDDING)
    if w1 is None or embedding is None or w1[0].dim() != 2 or embedding[0].dim() != 2:
        raise CheckpointError(f"{path.parent}: the shards hold no layers.0.feed_forward.w1 or tok_embeddings matrix")
    dim, n_heads = params.get("dim"), params.get("n_heads")
    # Llama 3 splits the embedding by tokens, Llama 2 by features.
    vocab_size = sum(part.shape[0] for part in embedding)
    if len(embedding) > 1 and embedding[0].shape[1] != dim:
        vocab_size = embedding[0].shape[0]
    config = ModelConfig.build(
        str(path),
        vocab_size=vocab_size,
        dim=dim,
        n_layers=params.get("n_layers"),
        n_heads=n_heads,
        n_kv_heads=params.get("n_kv_heads") or n_heads,
        ffn_dim=sum(part.shape[0] for part in w1),
        norm_eps=_number(path, params, "norm_eps", 1e-5),
        rope_theta=_number(path, params, "rope_theta", 10000.0),
        max_seq_len=params.get("max_seq_len") or 4096,
        tie_word_embeddings=LM_HEAD not in parts,
    )
    return _complete_config(path, config, params)


def _number(path: Path, params: dict[str, Any], key: str, default: float) -> float:
    value = params.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a number")
    return float(value)


def _complete_config(path: Path, config: ModelConfig, params: dict[str, Any]) -> ModelConfig:
    """Add what params.json does not say: it is known for the published sizes, and as in Llama 3.1's 8B otherwise."""
    if not params.get("use_scaled_rope"):
        is_llama3 = config.vocab_size >= 128_000
        return config.model_copy(update={"max_seq_len": 8192}) if is_llama3 and "max_seq_len" not in params else config
    sizes = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
    for name, preset in PRESETS.items():
        if name.startswith("llama") and all(getattr(preset, size) == getattr(config, size) for size in sizes):
            return preset.model_copy(update={"norm_eps": config.norm_eps, "rope_theta": config.rope_theta})
    factor, high = (_number(path, params, key, default) for key, default in _SCALING_DEFAULTS.items())
    if factor < 1 or high <= 1:
        raise CheckpointError(f"{path}: rope_scaling_factor {factor} must be >= 1, rope_high_freq_factor {high} > 1")
    scaling = RopeScaling(factor=factor, high_freq_factor=high)
    return config.model_copy(update={"rope_scaling": scaling, "max_seq_len": params.get("max_seq_len") or 131072})


def _join(
    directory: Path, name: str, parts: tuple[Any, ...], expected: Sequence[int] | None, config: ModelConfig
) -> Joined:
    head_dim = config.head_dim if rotary_heads(name) else None
    if parts[0].dim() == 1 or len(parts) == 1:
        return _check_heads(directory, name, Joined(parts[:1], 0, head_dim))
    by_columns = name.endswith(_ROW_PARALLEL) or (name == EMBEDDING and parts[0].shape[0] == config.vocab_size)
    joined = Joined(parts, 1 if by_columns else 0, head_dim)
    # With more shards than KV heads, each KV head is in several shards.
    rows = joined.shape[0]
    if expected is not None and not by_columns and rows > expected[0] and rows % expected[0] == 0:
        joined = Joined(parts[:: rows // expected[0]], 0, head_dim)
    return _check_heads(directory, name, joined)


def _check_heads(directory: Path, name: str, tensor: Joined) -> Joined:
    if tensor.head_dim is not None and tensor.shape[0] % tensor.head_dim:
        raise CheckpointError(
            f"{directory}: {name} has {tensor.shape[0]} rows, not whole heads of {tensor.head_dim}; "
            f"check dim and n_heads in {PARAMS_NAME}"
        )
    return tensor
