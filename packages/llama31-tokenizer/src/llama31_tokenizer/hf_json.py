"""Hugging Face `tokenizer.json`: the file's bytes in, a `Vocabulary` out, or the reason why it can't be had exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama31_tokenizer.bpe_checks import check_merges
from llama31_tokenizer.byte_level import spelling_to_bytes
from llama31_tokenizer.controls import build_controls
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.patterns import pattern_of_pre_tokenizer
from llama31_tokenizer.vocabulary import Normalization, Vocabulary


class UnsupportedVocabularyError(TokenizerError):
    """The file is sound and this package can't give its exact ids; another file of the directory may serve."""


def parse_json_object(data: bytes, source: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        TokenizerError: it is not JSON or not an object, with line and column.
    """
    try:
        parsed = json.loads(data)
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{source}: byte {error.start} is not UTF-8; the file is damaged, fetch it again"
        ) from error
    except json.JSONDecodeError as error:
        raise TokenizerError(
            f"{source}:{error.lineno}: column {error.colno}: not JSON ({error.msg}); the file is truncated or damaged, "
            "fetch it again"
        ) from error
    if not isinstance(parsed, dict):
        raise TokenizerError(f"{source}: holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def parse_hf_json(data: bytes, source: Path, sha256: str, config: Mapping[str, Any] | None = None) -> Vocabulary:
    """A byte-level BPE vocabulary.

    Args:
        data: bytes of the tokenizer.json.
        source: its path.
        sha256: of `data`.
        config: the tokenizer_config.json beside it, which names bos, eos and pad.

    Raises:
        UnsupportedVocabularyError: another model family, or an option that this package does not do exactly.
        TokenizerError: a damaged file.
    """
    root = parse_json_object(data, source)
    config = config or {}
    model = root.get("model")
    if isinstance(model, dict):
        _refuse_other_families(model, root, source)
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(
            f"{source}: no `model` object with a `vocab` object, expected a Hugging Face tokenizer.json; "
            "give the tokenizer file, not a model's configuration"
        )
    vocab: dict[str, int] = dict(model["vocab"])
    special, literal = _read_added_tokens(root.get("added_tokens") or [], source)
    for name in (*special, *literal):
        vocab.pop(name, None)
    ranks = _read_ranks(vocab, source)
    try:
        check_merges(vocab, _read_merges(model.get("merges"), source))
        pattern = pattern_of_pre_tokenizer(root.get("pre_tokenizer"))
    except ValueError as error:
        raise UnsupportedVocabularyError(f"{source}: {error}") from error
    all_added = special | literal
    unknown = model.get("unk_token")
    first, last = _template_ends(root.get("post_processor"))
    named = {role: _token_id(config.get(f"{role}_token"), all_added | vocab) for role in ("bos", "eos", "pad", "unk")}
    if named["bos"] is None and first is not None:
        named["bos"] = all_added.get(first)
    add_bos = config.get("add_bos_token")
    add_eos = config.get("add_eos_token")
    controls = build_controls(
        special,
        bos_id=named["bos"],
        eos_id=named["eos"],
        pad_id=named["pad"],
        unk_id=named["unk"],
        add_bos=first is not None if add_bos is None else bool(add_bos),
        add_eos=last is not None if add_eos is None else bool(add_eos),
    )
    return Vocabulary(
        kind="hf-json",
        source=source,
        sha256=sha256,
        size=max([*ranks.values(), *all_added.values()]) + 1,
        ranks=ranks,
        special_tokens=special,
        literal_tokens=literal,
        controls=controls,
        pattern=pattern,
        normalization=_read_normalizer(root.get("normalizer"), source),
        unknown_byte_id=None if unknown is None else (all_added | vocab).get(unknown),
        chat_template=read_chat_template(config),
    )


def read_chat_template(config: Mapping[str, Any]) -> str | None:
    """The default template of a tokenizer_config.json, which holds one string or a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _refuse_other_families(model: Mapping[str, Any], root: Mapping[str, Any], source: Path) -> None:
    def refuse(what: str, change: str) -> UnsupportedVocabularyError:
        return UnsupportedVocabularyError(f"{source}: {what}, supported is byte-level BPE; {change}")

    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise refuse(f"model.type is {kind}", "this is another model family")
    if model.get("byte_fallback"):
        raise refuse("model.byte_fallback is true (a converted SentencePiece vocabulary)", "give its tokenizer.model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refuse(f"model.{key} is {model[key]!r}", f"it must be null or empty for {key}")
    if model.get("unk_token") is not None and model.get("fuse_unk"):
        raise refuse("model.fuse_unk is true", "it must be false")
    decoder = root.get("decoder")
    if decoder is not None and decoder.get("type") != "ByteLevel":
        raise refuse(f"decoder.type is {decoder.get('type')}", "it must be ByteLevel")


def _read_added_tokens(added: list[Any], source: Path) -> tuple[dict[str, int], dict[str, int]]:
    special: dict[str, int] = {}
    literal: dict[str, int] = {}
    owners: dict[int, str] = {}
    for index, token in enumerate(added):
        where = f"{source}: added_tokens[{index}]"
        if not isinstance(token, dict) or not isinstance(token.get("id"), int) or not token.get("content"):
            raise TokenizerError(f"{where}: expected an object with `id` and `content`; fetch the file again")
        name, token_id = token["content"], token["id"]
        for option in ("lstrip", "rstrip", "single_word"):
            if token.get(option):
                raise UnsupportedVocabularyError(f"{where} ({name!r}): {option} is true, supported is false")
        if owners.setdefault(token_id, name) != name:
            raise TokenizerError(f"{where}: id {token_id} belongs to {owners[token_id]!r} and {name!r}")
        (special if token.get("special") else literal)[name] = token_id
    return special, literal


def _read_ranks(vocab: Mapping[str, int], source: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for spelling, token_id in vocab.items():
        if not isinstance(token_id, int) or token_id < 0 or not spelling:
            raise TokenizerError(
                f"{source}: model.vocab: {spelling!r} has id {token_id!r}, expected a number from 0 on"
            )
        try:
            ranks[spelling_to_bytes(spelling)] = token_id
        except ValueError as error:
            raise UnsupportedVocabularyError(
                f"{source}: model.vocab: token {spelling!r} (id {token_id}): {error}"
            ) from error
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{source}: model.vocab: two tokens have one id; the file is damaged, fetch it again")
    if not ranks:
        raise TokenizerError(f"{source}: model.vocab is empty, expected byte-level tokens")
    return ranks


def _read_merges(merges: Any, source: Path) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise TokenizerError(f"{source}: model.merges is missing, expected a list; fetch the file again")
    pairs = []
    for index, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TokenizerError(f"{source}: model.merges[{index}] is {merge!r}, expected two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


def _read_normalizer(normalizer: Any, source: Path) -> Normalization | None:
    if normalizer is None or (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")):
        return None
    form = normalizer.get("type")
    if form in ("NFC", "NFD", "NFKC", "NFKD"):
        return form  # type: ignore[no-any-return]
    raise UnsupportedVocabularyError(
        f"{source}: normalizer.type is {form}, supported are none, NFC, NFD, NFKC and NFKD"
    )


def _template_ends(processor: Any) -> tuple[str | None, str | None]:
    """Names of the special tokens that a post-processor puts before and behind a text."""
    if not isinstance(processor, dict):
        return None, None
    if processor.get("type") == "Sequence":
        ends = [_template_ends(part) for part in processor.get("processors", [])]
        return next(((a, b) for a, b in ends if a or b), (None, None))
    if processor.get("type") != "TemplateProcessing":
        return None, None
    names = [(part.get("SpecialToken") or {}).get("id") for part in processor.get("single", [])]
    return (names[0], names[-1]) if names else (None, None)


def _token_id(value: Any, ids: Mapping[str, int]) -> int | None:
    name = value.get("content") if isinstance(value, dict) else value
    return ids.get(name) if isinstance(name, str) else None
