"""MindFormers' LlamaConfig to the fields of `ModelConfig`, and back.

The same keys stand under `model.model_config` of its YAML files and in the `config.json` that MindIE asks a model
directory for (what MindFormers' `save_pretrained(save_json=True)` writes). Defaults are those of its LlamaConfig.
"""

from __future__ import annotations

from typing import Any

from llama31_core.errors import ConfigError
from llama31_core.validation import did_you_mean

# MindFormers' key -> ours, where the value needs no translation.
ARCHITECTURE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "theta": "rope_theta",
    "max_position_embedding": "max_seq_len",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
_FLOATS = ("norm_eps", "rope_theta")
_REQUIRED = ("hidden_size", "num_layers", "num_heads", "vocab_size")
_OTHER_KEYS = ["eos_token_id", "extend_method", "ffn_dim_multiplier", "multiple_of", "scaling_factor", "seq_length"]
_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}
# Keys of LlamaConfig and of what it is derived from that say nothing about the forward computation.
_IGNORED = frozenset(
    {
        "architectures",
        "auto_map",
        "batch_size",
        "block_size",
        "checkpoint_name_or_path",
        "compute_dtype",
        "do_sample",
        "embedding_init_type",
        "fine_grain_interleave",
        "ignore_token_id",
        "is_dynamic",
        "layernorm_compute_type",
        "max_decode_length",
        "mindformers_version",
        "model_name",
        "moe_config",
        "num_blocks",
        "offset",
        "parallel_config",
        "parallel_optimizer",
        "param_init_type",
        "pp_interleave_num",
        "qkv_concat",
        "repetition_penalty",
        "rotary_dtype",
        "softmax_compute_type",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "type",
        "use_attn_mask_compression",
        "use_flash_attention",
        "use_past",
        "use_rope_slice",
    }
)
# Keys that change the architecture and have one value that this model implements.
_FIXED: dict[str, tuple[Any, ...]] = {"model_type": ("llama",), "qkv_has_bias": (False,), "quant": ("", None)}


def is_mindformers(values: dict[str, Any]) -> bool:
    """Whether the content of a config.json is of this form and not HF's."""
    return "num_layers" in values and "num_hidden_layers" not in values


def fields_from_mindformers(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Fields of `ModelConfig`, not yet validated.

    Raises:
        ConfigError: a key that is unknown or missing, or a value that this architecture does not have.
    """
    known = {*ARCHITECTURE_KEYS, *_OTHER_KEYS, *_FIXED}
    for key, value in values.items():
        if key not in known and key not in _IGNORED:
            raise ConfigError(f"{source}: unknown key {key!r}; {did_you_mean(key, known)}")
        if key in _FIXED and value not in _FIXED[key]:
            raise ConfigError(f"{source}: {key} is {value!r}, this architecture has {_FIXED[key][0]!r} only")
    missing = [key for key in _REQUIRED if values.get(key) is None]
    if missing:
        raise ConfigError(f"{source}: missing {', '.join(missing)}; they say what the model's architecture is")
    ours: dict[str, Any] = {
        "n_kv_heads": values["num_heads"],
        "max_seq_len": values.get("seq_length", 2048),
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    ours |= {ours_: values[key] for key, ours_ in ARCHITECTURE_KEYS.items() if values.get(key) is not None}
    ours |= {key: None for key in ("bos_token_id", "pad_token_id") if values.get(key, 0) is None}
    ours |= {name: float(ours[name]) for name in _FLOATS if isinstance(ours[name], int)}
    if "ffn_dim" not in ours:
        ours["ffn_dim"] = feed_forward_width(
            values["hidden_size"], values.get("multiple_of", 256), values.get("ffn_dim_multiplier")
        )
    eos = values.get("eos_token_id", 2)
    ours["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
    ours["rope_scaling"] = scaling_fields(values.get("extend_method"), values.get("scaling_factor"), source)
    return ours


def mindformers_from_fields(fields: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of the `config.json` of a model directory for MindIE with the MindFormers backend.

    Raises:
        ConfigError: a head width that LlamaConfig cannot say.
    """
    if fields["head_dim"] * fields["n_heads"] != fields["dim"]:
        raise ConfigError(
            f"head_dim is {fields['head_dim']}, MindFormers' LlamaConfig knows hidden_size / num_heads = "
            f"{fields['dim'] / fields['n_heads']:g} only; write config.json in HF form"
        )
    values: dict[str, Any] = {"model_type": "llama", "type": "LlamaConfig"}
    values |= {key: fields[ours] for key, ours in ARCHITECTURE_KEYS.items()}
    eos = list(fields["eos_token_ids"])
    values["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    values["seq_length"] = fields["max_seq_len"]
    scaling = fields["rope_scaling"]
    values["extend_method"] = "None" if scaling is None else "LLAMA3"
    values["scaling_factor"] = 1.0 if scaling is None else {key: scaling[ours] for key, ours in _SCALING_KEYS.items()}
    return values | {"compute_dtype": dtype, "param_init_type": dtype, "use_past": True, "is_dynamic": True}


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of the feed-forward where `intermediate_size` is not given.

    MindFormers' LlamaFeedForward: two thirds of 4 dim, times the multiplier and a hundredth, rounded up.
    """
    width = 4 * dim
    if multiplier is not None:
        width = int((multiplier + 0.01) * width)
    width = int(2 * width / 3)
    return -(-width // multiple_of) * multiple_of


def scaling_fields(extend_method: str | None, scaling_factor: Any, source: str) -> dict[str, Any] | None:
    """Fields of `RopeScaling` from `extend_method` and `scaling_factor`; None for plain rotary embedding.

    Raises:
        ConfigError: a method that this model does not have, or factors that are not its four.
    """
    if extend_method in (None, "None"):
        if scaling_factor not in (None, 1, 1.0):
            raise ConfigError(f"{source}: scaling_factor is {scaling_factor!r} without extend_method: 'LLAMA3'")
        return None
    if extend_method != "LLAMA3":
        raise ConfigError(f"{source}: extend_method is {extend_method!r}, allowed are 'LLAMA3' and 'None'")
    if not isinstance(scaling_factor, dict) or set(scaling_factor) != set(_SCALING_KEYS):
        raise ConfigError(
            f"{source}: scaling_factor of extend_method 'LLAMA3' is {scaling_factor!r}, expected "
            f"{', '.join(_SCALING_KEYS)}"
        )
    length = scaling_factor["original_max_position_embeddings"]
    factors = {ours: scaling_factor[key] for key, ours in _SCALING_KEYS.items()}
    factors = {name: float(value) if isinstance(value, int) else value for name, value in factors.items()}
    return factors | {"original_max_seq_len": length}
