"""SentencePiece vocabularies (`tokenizer.ggml.model` = llama): a GGUF file's metadata in, a `tokenizer.model` out.

A GGUF file keeps the pieces with their scores and kinds, in SentencePiece's own numbering, and a few of the settings.
The others are those of Llama's models: BPE, no normalisation (sentencepiece `src/sentencepiece_model.proto`; llama.cpp
`llama-vocab.cpp`, which assumes the same).
"""

from __future__ import annotations

import struct
from typing import Any

from gguf.constants import TokenType

from llama31_ckpt.gguf_format.header import GgufHeader
from llama31_core.checkpoint.ckpt_format import encode_varint
from llama31_core.errors import CheckpointError

_BPE = 2
_NUM_BYTES = 256
# Fields of the messages, by their numbers in the proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_ROLE_FIELDS = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}
_ROLE_PIECE_FIELDS = {"unknown": 45, "bos": 46, "eos": 47, "padding": 48}
_NORMALIZER_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5


def build_sentencepiece_model(header: GgufHeader, tokens: list[str], types: list[int]) -> bytes:
    """The content of `tokenizer.model`.

    Args:
        header: of the file.
        tokens: its pieces, by their ids.
        types: their kinds.

    Raises:
        CheckpointError: scores or kinds that are not one for each piece, or a set of pieces that no such model has.
    """
    scores = _scores(header, len(tokens))
    _check_kinds(header, tokens, types)
    pieces = b"".join(
        _message(_PIECES, _text(_PIECE_TEXT, token) + _float(_PIECE_SCORE, score) + _number(_PIECE_KIND, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    return pieces + _message(_TRAINER, _trainer(header, tokens, types)) + _message(_NORMALIZER, _normalizer(header))


def _scores(header: GgufHeader, count: int) -> list[float]:
    scores = header.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != count or not all(isinstance(score, float) for score in scores):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.scores must be {count} numbers, one for each token")
    return scores


def _check_kinds(header: GgufHeader, tokens: list[str], types: list[int]) -> None:
    unknown, num_bytes = types.count(TokenType.UNKNOWN), types.count(TokenType.BYTE)
    if unknown != 1 or num_bytes not in (0, _NUM_BYTES) or not all(tokens):
        raise CheckpointError(
            f"{header.path}: a SentencePiece vocabulary has one unknown token, all {_NUM_BYTES} bytes or none, and no "
            f"empty token; this one has {unknown}, {num_bytes} and {tokens.count('')}"
        )


def _trainer(header: GgufHeader, tokens: list[str], types: list[int]) -> bytes:
    roles = {role: header.metadata.get(f"tokenizer.ggml.{role}_token_id", -1) for role in _ROLE_FIELDS}
    roles["unknown"] = types.index(TokenType.UNKNOWN)
    content = _number(_MODEL_TYPE, _BPE) + _number(_VOCAB_SIZE, len(tokens))
    content += _number(_BYTE_FALLBACK, int(TokenType.BYTE in types))
    for role, number in roles.items():
        content += _number(_ROLE_FIELDS[role], number)
        content += _text(_ROLE_PIECE_FIELDS[role], tokens[number]) if number >= 0 else b""
    return content


def _normalizer(header: GgufHeader) -> bytes:
    add_prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    remove_extra = header.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False) is True
    return (
        _text(_NORMALIZER_NAME, "identity")
        + _number(_ADD_DUMMY_PREFIX, int(add_prefix))
        + _number(_REMOVE_EXTRA_SPACES, int(remove_extra))
        + _number(_ESCAPE_SPACES, 1)
    )


def build_sentencepiece_config(header: GgufHeader, special: dict[str, str | None], max_seq_len: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json` beside the model."""
    metadata = header.metadata
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", True) is True,
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False) is True,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": max_seq_len,
        **{name: token for name, token in special.items() if token is not None},
    }


def _key(number: int, wire_type: int) -> bytes:
    return encode_varint(number << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + encode_varint(value & (1 << 64) - 1)


def _float(field: int, value: float) -> bytes:
    return _key(field, 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _key(field, 2) + encode_varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8", "surrogateescape"))
