"""Files and directories in, a `Vocabulary` out: each file is told apart by its content, never by its name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama31_tokenizer import llama3
from llama31_tokenizer.controls import build_controls
from llama31_tokenizer.detect import detect_kind
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.gguf_vocab import load_gguf_vocabulary
from llama31_tokenizer.hf_json import (
    UnsupportedVocabularyError,
    parse_hf_json,
    parse_json_object,
    read_chat_template,
)
from llama31_tokenizer.patterns import LLAMA3
from llama31_tokenizer.ranks import parse_ranks
from llama31_tokenizer.sentencepiece_model import parse_sentencepiece
from llama31_tokenizer.vocabulary import Vocabulary


def load_vocabulary(path: Path, config: dict[str, Any] | None = None) -> Vocabulary:
    """The vocabulary of one file.

    Args:
        path: tiktoken ranks, a tokenizer.json, a GGUF or a SentencePiece model.
        config: tokenizer_config.json of a tokenizer.json or a SentencePiece model.

    Raises:
        TokenizerError: no such file, none of these kinds, or a damaged one.
    """
    try:
        kind = detect_kind(path)
        if kind == "gguf":
            return load_gguf_vocabulary(path)
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}); give a tokenizer file") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if kind == "sentencepiece":
        return parse_sentencepiece(data, path, sha256, config or {})
    if kind == "hf-json":
        return parse_hf_json(data, path, sha256, config)
    special = llama3.special_tokens()
    return Vocabulary(
        kind="tiktoken",
        source=path,
        sha256=sha256,
        size=llama3.VOCAB_SIZE,
        ranks=parse_ranks(data, path, sha256),
        special_tokens=special,
        controls=build_controls(special),
        pattern=LLAMA3,
    )


def load_directory(directory: Path) -> Vocabulary:
    """The vocabulary of a model directory.

    tokenizer.json comes first because it lists every added token, then tokenizer.model, then any other file that is
    one by content. A file this package can't use exactly gives way to the next.

    Raises:
        TokenizerError: not a directory, or nothing usable in it, with the reason for each file tried.
    """
    if not directory.is_dir():
        raise TokenizerError(f"{directory}: not a directory; give a model's directory, or the tokenizer file itself")
    config = _read_optional_json(directory / "tokenizer_config.json")
    refused: list[str] = []
    for path in _candidates(directory):
        try:
            vocabulary = load_vocabulary(path, config)
        except UnsupportedVocabularyError as error:
            refused.append(str(error))
            continue
        return _complete(vocabulary, directory, config)
    reasons = "; ".join(refused) or "no file in it is a tokenizer by content"
    raise TokenizerError(
        f"{directory}: no usable vocabulary ({reasons}); expected tokenizer.json, tokenizer.model or a GGUF model in it"
    )


def _candidates(directory: Path) -> list[Path]:
    first = [directory / "tokenizer.json", directory / "tokenizer.model"]
    others = sorted(path for path in directory.iterdir() if path.is_file() and path not in first)
    found = [path for path in first if path.is_file()]
    for path in others:
        try:
            kind = detect_kind(path)
        except (TokenizerError, OSError):
            continue
        if kind != "hf-json":  # config.json and its like are JSON too; the vocabulary has a fixed name
            found.append(path)
    return found


def _complete(vocabulary: Vocabulary, directory: Path, config: dict[str, Any]) -> Vocabulary:
    """With the chat template and the stop ids that lie beside the vocabulary."""
    template_file = directory / "chat_template.jinja"
    template = read_chat_template(config) or vocabulary.chat_template
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    stops = _read_optional_json(directory / "generation_config.json").get("eos_token_id")
    stated = [stops] if isinstance(stops, int) else stops if isinstance(stops, list) else []
    bad = [token_id for token_id in stated if not isinstance(token_id, int) or not 0 <= token_id < vocabulary.size]
    if bad:
        raise TokenizerError(
            f"{directory / 'generation_config.json'}: eos_token_id has {bad[0]!r}, expected ids below {vocabulary.size}"
        )
    controls = vocabulary.controls
    stop_ids = tuple(dict.fromkeys([*controls.stop_ids, *stated]))
    return replace(vocabulary, chat_template=template, controls=replace(controls, stop_ids=stop_ids))


def _read_optional_json(path: Path) -> dict[str, Any]:
    return parse_json_object(path.read_bytes(), path) if path.is_file() else {}
