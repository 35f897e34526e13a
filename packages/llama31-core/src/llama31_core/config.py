"""The architecture of a Llama model: HF `config.json`, a preset's name or keyword arguments in, `ModelConfig` out.

Field names are those of Meta's reference (`dim`, `n_layers`, `n_kv_heads`); `to_hf` and `from_hf` translate them.
This module holds the architecture alone: sampling, paths and parallelism have configurations of their own.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from llama31_core.errors import ConfigError

# HF's key -> ours, where the value needs no translation.
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
# Keys that change the architecture and have one value that this model implements.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
# Keys that say nothing about the forward computation of this architecture.
_HF_IGNORED = frozenset(
    {
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "rope_interleaved",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "use_bfloat16",
        "use_cache",
    }
)


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

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs")
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
                raise ConfigError(f"{source}: unknown key {key!r}{_did_you_mean(key, cls.model_fields)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_first_problem(error)}") from error

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of the published architectures by name, or `tiny` (see `PRESETS`)."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: allowed are {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, values: dict[str, Any], *, source: str = "config.json") -> ModelConfig:
        """A config from the content of an HF `config.json` of model type llama.

        Raises:
            ConfigError: a key that is unknown or missing, or a value that this architecture does not have.
        """
        known = {*_HF_KEYS, *_HF_FIXED, "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters"}
        for key, value in values.items():
            if key not in known and key not in _HF_IGNORED:
                raise ConfigError(f"{source}: unknown key {key!r}{_did_you_mean(key, known)}")
            if key in _HF_FIXED and value not in _HF_FIXED[key]:
                allowed = " or ".join(map(repr, _HF_FIXED[key]))
                raise ConfigError(f"{source}: {key} is {value!r}, this architecture has {allowed} only")
        required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [key for key in required if key not in values]
        if missing:
            raise ConfigError(f"{source}: missing {', '.join(missing)}; is it the config.json of a Llama model?")
        # Absent keys have the defaults of transformers' LlamaConfig, not ours.
        ours: dict[str, Any] = {"max_seq_len": 2048, "norm_eps": 1e-6, "n_kv_heads": values["num_attention_heads"]}
        ours |= {_HF_KEYS[key]: value for key, value in values.items() if key in _HF_KEYS and value is not None}
        eos = values.get("eos_token_id")
        ours["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if isinstance(ours.get("pad_token_id"), int) and ours["pad_token_id"] < 0:
            ours["pad_token_id"] = None  # written as -1 by older exporters
        ours["norm_eps"] = _as_float(ours["norm_eps"])
        ours["rope_theta"], ours["rope_scaling"] = _rope_from_hf(values, source)
        return cls.build(source, **ours)

    def to_hf(self) -> dict[str, Any]:
        """The content of an HF `config.json`, which transformers' LlamaConfig reads."""
        values: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
        values |= {key: allowed[0] for key, allowed in _HF_FIXED.items()}
        values |= {key: getattr(self, ours) for key, ours in _HF_KEYS.items()}
        eos = self.eos_token_ids
        values["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        values["rope_theta"] = self.rope_theta
        values["rope_scaling"] = None
        if self.rope_scaling is not None:
            values["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_seq_len,
            }
        return values

    @classmethod
    def from_pretrained(cls, model_dir: str | Path) -> ModelConfig:
        """The config of a model directory (its `config.json`)."""
        path = Path(model_dir) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; a model directory holds config.json") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a JSON {type(values).__name__}, expected an object")
        return cls.from_hf(values, source=str(path))

    def save_pretrained(self, model_dir: str | Path) -> Path:
        """Write `config.json` in HF form into `model_dir` (made if absent) and return its path."""
        path = Path(model_dir) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(self.to_hf(), indent=2) + "\n", encoding="utf-8")
        part.replace(path)
        return path


def _rope_from_hf(values: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and the scaling, from either spelling: `rope_scaling` or transformers 5's `rope_parameters`."""
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: rope_scaling is {found!r}, expected an object")
    parameters = dict(found)
    theta = _as_float(parameters.pop("rope_theta", values.get("rope_theta", 10000.0)))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{source}: rope_scaling type is {kind!r}, allowed are 'llama3' and 'default'")
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    }
    if set(parameters) != set(names):
        raise ConfigError(f"{source}: rope_scaling of type llama3 has {sorted(parameters)}, expected {sorted(names)}")
    ours = {name: parameters[key] for key, name in names.items()}
    ours |= {key: _as_float(value) for key, value in ours.items() if key != "original_max_seq_len"}
    try:
        return theta, RopeScaling(**ours)
    except ValidationError as error:
        raise ConfigError(f"{source}: rope_scaling: {_first_problem(error)}") from error


def _as_float(value: Any) -> Any:
    """JSON writes 500000.0 as 500000 at times; anything that is not a number is left for the validation."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else value


def _did_you_mean(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed are {', '.join(sorted(known))}"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return message
    got = "" if problem["type"] == "missing" or "got" in message else f", got {problem['input']!r}"
    return f"{where}: {message}{got}"


def _llama3(dim: int, layers: int, heads: int, ffn_dim: int, *, scaling: float = 8.0, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=8,
        ffn_dim=ffn_dim,
        rope_scaling=RopeScaling(factor=scaling),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        pad_token_id=128004,
        **more,
    )


PRESETS: dict[str, ModelConfig] = {
    "llama3.1-8b": _llama3(4096, 32, 32, 14336),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, scaling=32.0, tie_word_embeddings=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, scaling=32.0, tie_word_embeddings=True),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        ffn_dim=1536,
        rope_theta=100000.0,
        max_seq_len=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=160,
        rope_scaling=RopeScaling(original_max_seq_len=64),
        max_seq_len=512,
    ),
}
