"""The vocabulary inside a GGUF model: its `tokenizer.ggml.*` keys in, a `Vocabulary` out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama31_tokenizer.bpe_checks import check_merges
from llama31_tokenizer.byte_level import spelling_to_bytes
from llama31_tokenizer.controls import build_controls
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.gguf_metadata import read_gguf_metadata
from llama31_tokenizer.patterns import GGUF_PATTERNS, LLAMA3
from llama31_tokenizer.vocabulary import Vocabulary

_CONTROL, _USER_DEFINED, _UNKNOWN, _UNUSED = 3, 4, 2, 5  # llama.cpp's llama_token_type


def load_gguf_vocabulary(path: Path) -> Vocabulary:
    """The byte-level BPE vocabulary (`tokenizer.ggml.model` "gpt2") of a GGUF file.

    The tensors are not read, so `sha256` is that of the file's key-value header.

    Raises:
        TokenizerError: no vocabulary, one of another kind, or an unknown pre-tokeniser, by name.
    """
    fields, sha256 = read_gguf_metadata(path, lambda key: key.startswith("tokenizer."))
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise TokenizerError(
            f"{path}: tokenizer.ggml.model is {model!r}, supported is 'gpt2' (byte-level BPE); "
            "use the tokenizer.model or tokenizer.json of the original checkpoint"
        )
    pre = fields.get("tokenizer.ggml.pre", "")
    pattern = GGUF_PATTERNS.get(pre)
    if pattern is None:
        raise TokenizerError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, supported are {', '.join(GGUF_PATTERNS)}; "
            "another pre-tokeniser would give wrong ids, use the checkpoint's tokenizer.json"
        )
    tokens = _strings(fields, "tokenizer.ggml.tokens", path)
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries, expected {len(tokens)}")
    special, literal, vocab = _sort_tokens(tokens, types, path)
    merges = [_split_merge(merge) for merge in _strings(fields, "tokenizer.ggml.merges", path)]
    try:
        check_merges(vocab, merges)
        ranks = {spelling_to_bytes(spelling): token_id for spelling, token_id in vocab.items()}
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from error

    def stated(role: str) -> int | None:
        token_id = fields.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None and token_id >= len(tokens):
            raise TokenizerError(f"{path}: tokenizer.ggml.{role}_token_id is {token_id}, beyond {len(tokens)} tokens")
        return token_id

    turn_ends = [token_id for role in ("eot", "eom") if (token_id := stated(role)) is not None]
    return Vocabulary(
        kind="gguf",
        source=path,
        sha256=sha256,
        size=len(tokens),
        ranks=ranks,
        special_tokens=special,
        literal_tokens=literal,
        controls=build_controls(
            special,
            bos_id=stated("bos"),
            eos_id=stated("eos"),
            pad_id=stated("padding"),
            unk_id=stated("unknown"),
            stop_ids=turn_ends,
            add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pattern is LLAMA3)),
            add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        ),
        pattern=pattern,
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _strings(fields: Mapping[str, Any], key: str, path: Path) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise TokenizerError(f"{path}: {key} is missing or not a list of strings; the file holds no vocabulary")
    return value


def _sort_tokens(
    tokens: list[str], types: list[int], path: Path
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Special, literal and ordinary tokens, each spelling -> id."""
    groups: dict[int, dict[str, int]] = {_CONTROL: {}, _USER_DEFINED: {}}
    ordinary: dict[str, int] = {}
    for token_id, (spelling, kind) in enumerate(zip(tokens, types, strict=True)):
        group = groups.get(_CONTROL if kind == _UNKNOWN else kind, ordinary)
        if kind == _UNUSED:
            continue
        if group.setdefault(spelling, token_id) != token_id:
            raise TokenizerError(f"{path}: token {spelling!r} has ids {group[spelling]} and {token_id}, expected one")
    return groups[_CONTROL], groups[_USER_DEFINED], ordinary


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
