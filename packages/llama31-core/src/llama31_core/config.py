"""The architecture of a Llama model: HF `config.json`, a preset's name or keyword arguments in, `ModelConfig` out.

Field names are those of Meta's reference (`dim`, `n_layers`, `n_kv_heads`); hf_config.py and mindformers_config.py
translate them.
This module holds the architecture alone: sampling, paths and parallelism have configurations of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from llama31_core.errors import ConfigError
from llama31_core.hf_config import fields_from_hf, hf_from_fields
from llama31_core.mindformers_config import fields_from_mindformers, is_mindformers, mindformers_from_fields
from llama31_core.validation import did_you_mean, first_problem

_MAX_LAYERS = 10_000  # 80 times those of the largest Llama


class RopeScaling(BaseModel):
    """Frequency scaling of Llama 3.1 (`apply_scaling` in Meta's llama-models `models/llama3/model.py`).

    Wavelengths over `original_max_seq_len / low_freq_factor` positions are stretched by `factor`, those under
    `original_max_seq_len / high_freq_factor` stay, and between the two the stretch is interpolated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.factor < 1 or self.low_freq_factor <= 0 or self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("needs factor >= 1 and high_freq_factor > low_freq_factor > 0")
        return self


class Quantization(BaseModel):
    """How a checkpoint holds its matrices in few bits (see checkpoint/quantized.py).

    Attributes:
        bits: of a weight.
        group_size: columns that share a scale and a bias; a multiple of 32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: Literal[8, 4]
    group_size: int = 128

    @model_validator(mode="after")
    def _check(self) -> Quantization:
        if self.group_size < 32 or self.group_size % 32:
            raise ValueError(f"group_size must be a multiple of 32, got {self.group_size}")
        return self

    @classmethod
    def build(cls, source: str, /, **values: Any) -> Quantization:
        """As `ModelConfig.build`."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {first_problem(error)}") from error


class ModelConfig(BaseModel):
    """A Llama architecture.

    Attributes:
        vocab_size: rows of the token embedding.
        dim: width of the residual stream.
        n_layers: transformer blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; divides `n_heads` (grouped-query attention).
        head_dim: width of one head; `dim // n_heads` unless given.
        ffn_dim: inner width of the SwiGLU feed-forward.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3.1's frequency scaling, or None for plain RoPE.
        max_seq_len: the context, in tokens.
        tie_word_embeddings: the output head is the token embedding.
        bos_token_id, eos_token_ids, pad_token_id: special ids, where the checkpoint names them.
        quantization: how the checkpoint holds its matrices, if not in whole number types.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int = 0
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 131072
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    quantization: Quantization | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("head_dim"):
            dim, heads = values.get("dim"), values.get("n_heads")
            if isinstance(dim, int) and isinstance(heads, int) and heads > 0:
                if dim % heads:
                    raise ValueError(f"dim={dim} is not a multiple of n_heads={heads}; give head_dim")
                return {**values, "head_dim": dim // heads}
        return values

    @field_validator("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value <= 0:
            raise ValueError(f"must be positive, got {value}")
        return value

    @field_validator("n_layers")
    @classmethod
    def _countable(cls, value: int) -> int:
        # A damaged number must not have every name of a billion layers spelled out before anything is compared.
        if value > _MAX_LAYERS:
            raise ValueError(f"must be at most {_MAX_LAYERS}, got {value}")
        return value

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs")
        if self.quantization is not None:
            for name, columns in (
                ("dim", self.dim),
                ("q_dim", self.n_heads * self.head_dim),
                ("ffn_dim", self.ffn_dim),
            ):
                if columns % 32:
                    raise ValueError(f"{name}={columns} is not a multiple of 32, which quantised matrices need")
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise ValueError("norm_eps and rope_theta must be positive")
        named = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        named |= {f"eos_token_ids[{i}]": token for i, token in enumerate(self.eos_token_ids)}
        for name, token in named.items():
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}={token} is not in the vocabulary of {self.vocab_size}")
        return self

    @property
    def num_parameters(self) -> int:
        """Trainable scalars; a tied head counts once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.n_layers * block + self.dim

    @classmethod
    def build(cls, source: str, /, **values: Any) -> ModelConfig:
        """A config from keyword values.

        Args:
            source: what to name in an error, for instance the file the values came from.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), or a value that does not fit.
        """
        for key in values:
            if key not in cls.model_fields:
                raise ConfigError(f"{source}: unknown key {key!r}; {did_you_mean(key, cls.model_fields)}")
        try:
            if isinstance(values.get("rope_scaling"), dict):
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            if isinstance(values.get("quantization"), dict):
                values["quantization"] = Quantization(**values["quantization"])
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {first_problem(error)}") from error

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of the published architectures by name, or `tiny` (see presets.py)."""
        from llama31_core.presets import PRESETS  # which are ModelConfigs

        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: allowed are {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, values: dict[str, Any], *, source: str = "config.json") -> ModelConfig:
        """A config from the content of an HF `config.json` of model type llama.

        Raises:
            ConfigError: a key that is unknown or missing, or a value that this architecture does not have.
        """
        return cls.build(source, **fields_from_hf(values, source))

    def to_hf(self) -> dict[str, Any]:
        """The content of an HF `config.json`, which transformers' LlamaConfig reads."""
        return hf_from_fields(self.model_dump())

    @classmethod
    def from_pretrained(cls, model_dir: str | Path) -> ModelConfig:
        """The config of a model directory: its `config.json`, in HF's form or MindFormers'; or that of a run file.

        Args:
            model_dir: the directory, or a YAML file whose `model.model_config` describes the architecture.

        Raises:
            ConfigError: missing, not JSON or YAML, or not that of a Llama model.
        """
        if Path(model_dir).suffix in (".yaml", ".yml"):
            from llama31_core.run_config import load_any_config  # whose sections build ModelConfigs

            return load_any_config(model_dir).model_section.architecture(f"{model_dir}: model.model_config")
        path = Path(model_dir) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; a model directory holds config.json") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a JSON {type(values).__name__}, expected an object")
        if is_mindformers(values):
            return cls.build(str(path), **fields_from_mindformers(values, str(path)))
        return cls.from_hf(values, source=str(path))

    def save_pretrained(self, model_dir: str | Path, form: Literal["hf", "mindformers"] = "hf") -> Path:
        """Write `config.json` into `model_dir` (made if absent) and return its path.

        Args:
            model_dir: where to.
            form: HF's, or that of MindFormers' LlamaConfig, which MindIE reads. `from_pretrained` takes both.
        """
        values = self.to_hf() if form == "hf" else mindformers_from_fields(self.model_dump())
        path = Path(model_dir) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
        return path
