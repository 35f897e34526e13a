"""THE name table: what MindFormers, Hugging Face, GGUF and Meta call each tensor of a Llama model.

MindFormers' names are the canonical ones; `canonical_name` translates any spelling to them and `spell` writes them in
another. Everything that reads or writes a checkpoint goes through this table. Fused tensors of MindFormers
(`qkv_concat`) and tensors that are no weights (rotary caches, optimiser state) are named here too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["mindformers", "hf", "gguf", "meta"]
SCHEMES: tuple[Scheme, ...] = ("mindformers", "hf", "gguf", "meta")
Heads = Literal["n_heads", "n_kv_heads"]


@dataclass(frozen=True)
class NameRow:
    """One tensor under its four names; `{n}` stands for the layer.

    `rotary_heads` is set where the rows are rotary pairs: Meta and GGUF interleave the two halves of each head, HF and
    MindFormers do not, so a conversion must permute the rows head by head.
    """

    mindformers: str
    hf: str
    gguf: str
    meta: str
    rotary_heads: Heads | None = None


def _layer(ours: str, hf: str, gguf: str, rotary_heads: Heads | None = None) -> NameRow:
    return NameRow(
        f"model.layers.{{n}}.{ours}.weight",
        f"model.layers.{{n}}.{hf}.weight",
        f"blk.{{n}}.{gguf}.weight",
        f"layers.{{n}}.{ours}.weight",
        rotary_heads,
    )


NAME_TABLE = (
    NameRow(
        "model.tok_embeddings.embedding_weight",
        "model.embed_tokens.weight",
        "token_embd.weight",
        "tok_embeddings.weight",
    ),
    _layer("attention.wq", "self_attn.q_proj", "attn_q", "n_heads"),
    _layer("attention.wk", "self_attn.k_proj", "attn_k", "n_kv_heads"),
    _layer("attention.wv", "self_attn.v_proj", "attn_v"),
    _layer("attention.wo", "self_attn.o_proj", "attn_output"),
    _layer("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    _layer("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    _layer("feed_forward.w3", "mlp.up_proj", "ffn_up"),
    _layer("attention_norm", "input_layernorm", "attn_norm"),
    _layer("ffn_norm", "post_attention_layernorm", "ffn_norm"),
    NameRow("model.norm_out.weight", "model.norm.weight", "output_norm.weight", "norm.weight"),
    NameRow("lm_head.weight", "lm_head.weight", "output.weight", "output.weight"),
)

EMBEDDING = "model.tok_embeddings.embedding_weight"
NORM_OUT = "model.norm_out.weight"
LM_HEAD = "lm_head.weight"
# MindFormers' `qkv_concat` form: these rows stacked in this order.
FUSED = {
    "model.layers.{n}.attention.w_qkv.weight": ("attention.wq", "attention.wk", "attention.wv"),
    "model.layers.{n}.feed_forward.w_gate_hidden.weight": ("feed_forward.w1", "feed_forward.w3"),
}

# Adam's moments of a parameter, as our optimiser and as MindFormers' calls them; they are split like the parameter.
MOMENT_PREFIXES = ("adam_mean.", "adam_variance.", "adam_m.", "adam_v.")

_BY_SCHEME: dict[Scheme, dict[str, NameRow]] = {
    scheme: {getattr(row, scheme): row for row in NAME_TABLE} for scheme in SCHEMES
}
_LAYER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")
# Recomputed from the config by every implementation.
_DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight")
_TRAINING_STATE = re.compile(
    r"(adam_mean|adam_variance|adam_[mv]|moments|moment[12]|accu_grads|learning_rate|weight_decay)(\..*)?"
    r"|global_step|current_iterator_step|last_overflow_iterator_step|scale_sense|loss_scale|epoch_num|step_num"
    r"|beta[12]_power|clip_grad_norm|data_parallel|model_parallel"
)


def split_layer(name: str) -> tuple[str, int | None]:
    """`name` with its layer number replaced by `{n}`, and the number (None if there is none)."""
    match = _LAYER.search(name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}{{n}}{name[match.end() :]}", int(match.group())


def find_row(name: str, scheme: Scheme) -> tuple[NameRow, int | None] | None:
    """The table's row for `name` as `scheme` spells it, and the layer; None for a name it does not have."""
    template, layer = split_layer(name)
    row = _BY_SCHEME[scheme].get(template)
    return None if row is None else (row, layer)


def canonical_name(name: str, scheme: Scheme) -> str | None:
    """MindFormers' name of a tensor that `scheme` calls `name`, or None if the table has no such name."""
    found = find_row(name, scheme)
    return None if found is None else fill_layer(found[0].mindformers, found[1])


def spell(canonical: str, scheme: Scheme) -> str:
    """How `scheme` calls the tensor with this canonical name.

    Raises:
        KeyError: not a canonical name.
    """
    found = find_row(canonical, "mindformers")
    if found is None:
        raise KeyError(canonical)
    return fill_layer(getattr(found[0], scheme), found[1])


def fill_layer(template: str, layer: int | None) -> str:
    return template if layer is None else template.replace("{n}", str(layer))


def rotary_heads(canonical: str) -> Heads | None:
    """Which head count groups the rows of this tensor into rotary pairs; None if its rows are no such pairs."""
    found = find_row(canonical, "mindformers")
    return None if found is None else found[0].rotary_heads


def split_moment(name: str) -> tuple[str, str]:
    """`adam_mean.` (or another of `MOMENT_PREFIXES`) and the parameter whose moment it is; "" and `name` for others."""
    prefix = next((prefix for prefix in MOMENT_PREFIXES if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)


def fused_members(name: str) -> tuple[str, ...]:
    """The weights whose rows a fused tensor (or a moment of one) stacks, in order; `name` alone for any other."""
    prefix, parameter = split_moment(name)
    template, layer = split_layer(parameter)
    if template not in FUSED:
        return (name,)
    return tuple(f"{prefix}{fill_layer(f'model.layers.{{n}}.{part}.weight', layer)}" for part in FUSED[template])


def fused_name(canonical: str) -> str:
    """The fused tensor that stacks this weight (or moment) with others; the name itself where none does."""
    prefix, parameter = split_moment(canonical)
    layer = split_layer(parameter)[1]
    for template in FUSED if layer is not None else ():
        name = prefix + fill_layer(template, layer)
        if canonical in fused_members(name):
            return name
    return canonical


def is_training_state(name: str) -> bool:
    """Whether an entry is optimiser or loop state of a training run."""
    return bool(_TRAINING_STATE.fullmatch(name))


def order_key(name: str) -> tuple[int, int, int, str]:
    """Sorts entries: weights in the order of `parameter_shapes`, each kind of moment in the same, then the rest."""
    prefix, parameter = split_moment(name)
    kind = 1 + MOMENT_PREFIXES.index(prefix) if prefix else 0
    found = find_row(parameter, "mindformers")
    if found is None:
        return len(MOMENT_PREFIXES) + 1, 0, 0, name
    row, layer = NAME_TABLE.index(found[0]), found[1]
    # The embedding comes first, then the layers one after the other, then what follows them.
    place = layer if layer is not None else (-1 if row == 0 else 1 << 30)
    return kind, place, row, name


def is_ignorable(name: str) -> bool:
    """Whether a checkpoint's entry is no weight: a rotary cache, or optimiser and loop state of a training run."""
    return bool(_DERIVED.fullmatch(name)) or is_training_state(name)
