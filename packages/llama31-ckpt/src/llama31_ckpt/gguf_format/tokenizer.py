"""The vocabulary of a GGUF file as a model directory's tokenizer files: metadata in, file names and contents out.

Byte-level BPE (`tokenizer.ggml.model` = gpt2), which Llama 3 and SmolLM2 have, becomes `tokenizer.json`. How text is
split before merging is only named in a GGUF file (`tokenizer.ggml.pre`), so the splits are listed here. Where the name
is not listed no tokenizer is written, since a wrong split gives plausible but wrong ids. SentencePiece (`llama`), which
Llama 2 and its relatives have, becomes `tokenizer.model`.
"""

from __future__ import annotations

import json
from typing import Any

from gguf.constants import TokenType

from llama31_ckpt.gguf_format.header import GgufHeader
from llama31_ckpt.gguf_format.sentencepiece import build_sentencepiece_config, build_sentencepiece_model
from llama31_core.errors import CheckpointError

_SENTENCEPIECE = "llama"
# Llama 3's regular expression (llama-models `models/llama3/tokenizer.py`, `pat_str`).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        _byte_level(use_regex=False),
    ],
}
_GPT2 = _byte_level(use_regex=True)
_SINGLE_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smollm": _SINGLE_DIGITS,
    "gpt-2": _GPT2,
}


def unsupported_vocabulary(header: GgufHeader) -> str | None:
    """Why no tokenizer can be written for this file; None if one can."""
    kind, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    if kind is None:
        return f"{header.path.name} has no vocabulary: no tokenizer is written"
    if kind != _SENTENCEPIECE and (kind != "gpt2" or pre not in _PRE_TOKENIZERS):
        known = ", ".join(_PRE_TOKENIZERS)
        return (
            f"the vocabulary of {header.path.name} is of kind {kind!r}, split {pre!r}; known are {_SENTENCEPIECE!r} "
            f"and 'gpt2' with {known}: no tokenizer is written, put the model's own beside the weights"
        )
    return None


def build_tokenizer_files(header: GgufHeader, max_seq_len: int) -> dict[str, bytes]:
    """`tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`, for the vocabulary in `header`.

    Raises:
        CheckpointError: a vocabulary that contradicts itself.
    """
    metadata = header.metadata
    tokens = _texts(header, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(set(tokens)) != len(tokens) or not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.tokens and token_type must list each token once")
    special = {name: _special_token(header, tokens, key) for name, key in _SPECIAL_IDS.items()}
    if metadata["tokenizer.ggml.model"] == _SENTENCEPIECE:
        files = {"tokenizer.model": build_sentencepiece_model(header)}
        config = build_sentencepiece_config(header, special, max_seq_len)
    else:
        tokenizer = _byte_level_tokenizer(header, tokens, types, special["bos_token"])
        files = {"tokenizer.json": _json(tokenizer)}
        config = _byte_level_config(header, special, max_seq_len)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return {**files, "tokenizer_config.json": _json(config)}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _byte_level_tokenizer(
    header: GgufHeader, tokens: list[str], types: list[int], bos_token: str | None
) -> dict[str, Any]:
    pre_tokenizer = _PRE_TOKENIZERS[header.metadata["tokenizer.ggml.pre"]]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(tokens, bos_token if _adds_bos(header) else None),
        "decoder": _GPT2,
        "model": _bpe_model(header, tokens, types, ignore_merges=pre_tokenizer is _LLAMA3),
    }


def _byte_level_config(header: GgufHeader, special: dict[str, str | None], max_seq_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(header),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        **{name: token for name, token in special.items() if token is not None},
    }


def _adds_bos(header: GgufHeader) -> bool:
    return header.metadata.get("tokenizer.ggml.add_bos_token") is True


def _texts(header: GgufHeader, key: str) -> list[str]:
    value = header.metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{header.path}: metadata {key} must be a list of texts")
    return value


def _special_token(header: GgufHeader, tokens: list[str], key: str) -> str | None:
    number = header.metadata.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise CheckpointError(f"{header.path}: {key} is {number!r}, the vocabulary has {len(tokens)} tokens")
    return tokens[number]


def _is_added(token_type: int) -> bool:
    return token_type in (TokenType.CONTROL, TokenType.USER_DEFINED)


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are matched whole in the text; control tokens are special too."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, **plain, "special": kind == TokenType.CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if _is_added(kind)
    ]


def _bpe_model(header: GgufHeader, tokens: list[str], types: list[int], *, ignore_merges: bool) -> dict[str, Any]:
    # Added tokens after the last plain one are not part of the BPE vocabulary (Llama 3 has 256 of them); those before
    # it must be, or tokenizers would number them anew (SmolLM2 begins with 17).
    size = len(tokens)
    while size and _is_added(types[size - 1]):
        size -= 1
    vocabulary = {token: number for number, token in enumerate(tokens[:size])}
    merges = _texts(header, "tokenizer.ggml.merges")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CheckpointError(f"{header.path}: merge {merge!r} names tokens that the vocabulary does not have")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": merges,
    }


def _post_processor(tokens: list[str], bos_token: str | None) -> dict[str, Any]:
    byte_level = _byte_level(use_regex=True)
    if bos_token is None:
        return byte_level
    bos = {"SpecialToken": {"id": bos_token, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": bos_token, "type_id": 1}}, second],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [tokens.index(bos_token)], "tokens": [bos_token]}},
    }
    return {"type": "Sequence", "processors": [byte_level, template]}
