"""The vocabulary inside a GGUF model: its `tokenizer.ggml.*` keys in, a `Vocabulary` out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama31_tokenizer.bpe_checks import check_merges
from llama31_tokenizer.byte_level import spelling_to_bytes
from llama31_tokenizer.controls import build_controls
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.gguf_metadata import read_gguf_metadata
from llama31_tokenizer.patterns import GGUF_PATTERNS, LLAMA3
from llama31_tokenizer.sentencepiece_model import parse_sentencepiece
from llama31_tokenizer.sentencepiece_proto import build_sentencepiece_model
from llama31_tokenizer.vocabulary import Vocabulary

_CONTROL, _USER_DEFINED, _UNKNOWN, _UNUSED = 3, 4, 2, 5  # llama.cpp's llama_token_type


def load_gguf_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file: byte-level BPE (`tokenizer.ggml.model` "gpt2") or SentencePiece ("llama").

    The tensors are not read, so `sha256` is that of the file's key-value header.

    Raises:
        TokenizerError: no vocabulary, one of another kind, or an unknown pre-tokeniser, by name.
    """
    fields, sha256 = read_gguf_metadata(path, lambda key: key.startswith("tokenizer."))
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level_vocabulary(fields, path, sha256)
    if model == "llama":
        return _sentencepiece_vocabulary(fields, path, sha256)
    raise TokenizerError(
        f"{path}: tokenizer.ggml.model is {model!r}, supported are 'gpt2' (byte-level BPE) and 'llama' "
        "(SentencePiece); use the tokenizer.model or tokenizer.json of the original checkpoint"
    )


def _sentencepiece_vocabulary(fields: Mapping[str, Any], path: Path, sha256: str) -> Vocabulary:
    try:
        model = build_sentencepiece_model(fields)
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from error
    config = {
        f"add_{role}_token": fields.get(f"tokenizer.ggml.add_{role}_token", role == "bos") for role in ("bos", "eos")
    }
    vocabulary = parse_sentencepiece(model, path, sha256, config)
    stops = [*vocabulary.controls.stop_ids, *_turn_ends(fields, vocabulary.size, path)]
    controls = replace(vocabulary.controls, stop_ids=tuple(dict.fromkeys(stops)))
    return replace(vocabulary, kind="gguf", controls=controls, chat_template=fields.get("tokenizer.chat_template"))


def _byte_level_vocabulary(fields: Mapping[str, Any], path: Path, sha256: str) -> Vocabulary:
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
            bos_id=_stated(fields, "bos", len(tokens), path),
            eos_id=_stated(fields, "eos", len(tokens), path),
            pad_id=_stated(fields, "padding", len(tokens), path),
            unk_id=_stated(fields, "unknown", len(tokens), path),
            stop_ids=_turn_ends(fields, len(tokens), path),
            add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pattern is LLAMA3)),
            add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        ),
        pattern=pattern,
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _stated(fields: Mapping[str, Any], role: str, count: int, path: Path) -> int | None:
    token_id: int | None = fields.get(f"tokenizer.ggml.{role}_token_id")
    if token_id is not None and token_id >= count:
        raise TokenizerError(f"{path}: tokenizer.ggml.{role}_token_id is {token_id}, beyond {count} tokens")
    return token_id


def _turn_ends(fields: Mapping[str, Any], count: int, path: Path) -> list[int]:
    ends = [_stated(fields, role, count, path) for role in ("eot", "eom")]
    return [token_id for token_id in ends if token_id is not None]


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
