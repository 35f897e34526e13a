"""A SentencePiece model from what a GGUF file keeps of it: `tokenizer.ggml.*` values in, a `tokenizer.model` out.

A GGUF file whose `tokenizer.ggml.model` is "llama" has the pieces with their scores and kinds, in SentencePiece's own
numbering, and a few of the settings. The others are those of Llama's models: BPE, no normalisation (sentencepiece
`src/sentencepiece_model.proto`; llama.cpp `llama-vocab.cpp`, which assumes the same).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN, BYTE = 2, 6  # kinds of pieces, the same numbers in GGUF and in SentencePiece's proto
_KINDS = range(1, 7)
_BPE = 2
_NUM_BYTES = 256
# Fields of the messages, by their numbers in the proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_ROLE_FIELDS = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}
_ROLE_PIECE_FIELDS = {"unknown": 45, "bos": 46, "eos": 47, "padding": 48}
_NORMALIZER_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5


def build_sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """The content of `tokenizer.model`.

    Args:
        metadata: key-value pairs of a GGUF file.

    Raises:
        ValueError: pieces, scores, kinds or ids that contradict each other, or that no such model has, by key.
    """
    pieces = _list(metadata, "tokenizer.ggml.tokens", str)
    scores = _list(metadata, "tokenizer.ggml.scores", float, len(pieces))
    kinds = _list(metadata, "tokenizer.ggml.token_type", int, len(pieces))
    _check_kinds(pieces, kinds)
    roles = {role: _role(metadata, role, len(pieces)) for role in _ROLE_FIELDS}
    roles["unknown"] = kinds.index(UNKNOWN)
    listed = b"".join(
        _message(_PIECES, _text(_PIECE_TEXT, piece) + _float(_PIECE_SCORE, score) + _number(_PIECE_KIND, kind))
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    )
    trainer = _trainer(pieces, roles, byte_fallback=BYTE in kinds)
    return listed + _message(_TRAINER, trainer) + _message(_NORMALIZER, _normalizer(metadata))


def _list(metadata: Mapping[str, Any], key: str, kind: type, count: int | None = None) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
        raise ValueError(
            f"{key} is missing or not a list of {kind.__name__}; the file holds no SentencePiece vocabulary"
        )
    if count is not None and len(value) != count:
        raise ValueError(f"{key} has {len(value)} entries, expected {count}, one for each token")
    return value


def _check_kinds(pieces: Sequence[str], kinds: Sequence[int]) -> None:
    unknown, num_bytes, empty = kinds.count(UNKNOWN), kinds.count(BYTE), pieces.count("")
    others = sorted(set(kinds) - set(_KINDS))
    if unknown != 1 or num_bytes not in (0, _NUM_BYTES) or empty or others or len(set(pieces)) != len(pieces):
        raise ValueError(
            f"a SentencePiece vocabulary has one unknown token, all {_NUM_BYTES} bytes or none, no empty token, none "
            f"twice and kinds 1 to 6; this one has {unknown} unknown, {num_bytes} bytes, {empty} empty, "
            f"{len(pieces) - len(set(pieces))} twice and kinds {others or 'in range'}"
        )


def _role(metadata: Mapping[str, Any], role: str, count: int) -> int:
    """The id with a role, -1 for none."""
    key = f"tokenizer.ggml.{role}_token_id"
    number = metadata.get(key, -1)
    if not isinstance(number, int) or not -1 <= number < count:
        raise ValueError(f"{key} is {number!r}, the vocabulary has {count} tokens")
    return number


def _trainer(pieces: Sequence[str], roles: Mapping[str, int], *, byte_fallback: bool) -> bytes:
    content = _number(_MODEL_TYPE, _BPE) + _number(_VOCAB_SIZE, len(pieces))
    content += _number(_BYTE_FALLBACK, int(byte_fallback))
    for role, number in roles.items():
        content += _number(_ROLE_FIELDS[role], number)
        content += _text(_ROLE_PIECE_FIELDS[role], pieces[number]) if number >= 0 else b""
    return content


def _normalizer(metadata: Mapping[str, Any]) -> bytes:
    add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    remove_extra = metadata.get("tokenizer.ggml.remove_extra_whitespaces", False) is True
    return (
        _text(_NORMALIZER_NAME, "identity")
        + _number(_ADD_DUMMY_PREFIX, int(add_prefix))
        + _number(_REMOVE_EXTRA_SPACES, int(remove_extra))
        + _number(_ESCAPE_SPACES, 1)
    )


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are 64-bit two's complement
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _key(field, 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8", "surrogateescape"))
