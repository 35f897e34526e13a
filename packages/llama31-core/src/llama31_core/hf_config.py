"""The content of an HF `config.json` to the fields of `ModelConfig`, and back; every key is known or an error."""

from __future__ import annotations

from typing import Any

from llama31_core.errors import ConfigError
from llama31_core.validation import did_you_mean

# HF's key -> ours, where the value needs no translation.
_KEYS = {
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
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
# Keys that say nothing about the forward computation of this architecture.
_IGNORED = frozenset(
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
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_QUANT_METHOD = "llama31"
_ROPE_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}


def fields_from_hf(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Fields of `ModelConfig`, not yet validated.

    Raises:
        ConfigError: a key that is unknown or missing, or a value that this architecture does not have.
    """
    known = {*_KEYS, *_FIXED, "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config"}
    for key, value in values.items():
        if key not in known and key not in _IGNORED:
            raise ConfigError(f"{source}: unknown key {key!r}; {did_you_mean(key, known)}")
        if key in _FIXED and value not in _FIXED[key]:
            allowed = " or ".join(map(repr, _FIXED[key]))
            raise ConfigError(f"{source}: {key} is {value!r}, this architecture has {allowed} only")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"{source}: missing {', '.join(missing)}; is it the config.json of a Llama model?")
    # Absent keys have the defaults of transformers' LlamaConfig, not ours.
    ours: dict[str, Any] = {"max_seq_len": 2048, "norm_eps": 1e-6, "n_kv_heads": values["num_attention_heads"]}
    ours |= {_KEYS[key]: value for key, value in values.items() if key in _KEYS and value is not None}
    eos = values.get("eos_token_id")
    ours["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if isinstance(ours.get("pad_token_id"), int) and ours["pad_token_id"] < 0:
        ours["pad_token_id"] = None  # written as -1 by older exporters
    ours["norm_eps"] = _as_float(ours["norm_eps"])
    ours["rope_theta"], ours["rope_scaling"] = _rope_from_hf(values, source)
    if values.get("quantization_config") is not None:
        ours["quantization"] = _quantization_from_hf(values["quantization_config"], source)
    return ours


def hf_from_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` that transformers' LlamaConfig reads."""
    values: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    values |= {key: allowed[0] for key, allowed in _FIXED.items()}
    values |= {key: fields[ours] for key, ours in _KEYS.items()}
    eos = fields["eos_token_ids"]
    values["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    values["rope_theta"] = fields["rope_theta"]
    scaling = fields["rope_scaling"]
    values["rope_scaling"] = None
    if scaling is not None:
        values["rope_scaling"] = {"rope_type": "llama3"} | {key: scaling[ours] for key, ours in _ROPE_KEYS.items()}
    if fields["quantization"] is not None:
        values["quantization_config"] = {"quant_method": _QUANT_METHOD} | fields["quantization"]
    return values


def _rope_from_hf(values: dict[str, Any], source: str) -> tuple[Any, dict[str, Any] | None]:
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
    if set(parameters) != set(_ROPE_KEYS):
        expected = sorted(_ROPE_KEYS)
        raise ConfigError(f"{source}: rope_scaling of type llama3 has {sorted(parameters)}, expected {expected}")
    floats = {ours: _as_float(parameters[key]) for key, ours in _ROPE_KEYS.items()}
    return theta, floats | {"original_max_seq_len": parameters["original_max_position_embeddings"]}


def _quantization_from_hf(found: Any, source: str) -> dict[str, Any]:
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != _QUANT_METHOD:
        raise ConfigError(
            f"{source}: quantization_config.quant_method is {method!r}, allowed is {_QUANT_METHOD!r}; take the "
            f"unquantised checkpoint and run llama31-ckpt quantize"
        )
    return {key: value for key, value in found.items() if key != "quant_method"}


def _as_float(value: Any) -> Any:
    """JSON writes 500000.0 as 500000 at times; anything that is not a number is left for the validation."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else value
