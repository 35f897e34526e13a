"""SentencePiece vocabularies (`tokenizer.ggml.model` = llama): GGUF metadata in, a model directory's files out.

The model itself is put together by the tokenizer package, which reads such files on its own as well.
"""

from __future__ import annotations

from typing import Any

from llama31_ckpt.gguf_format.header import GgufHeader
from llama31_core.errors import CheckpointError
from llama31_tokenizer import sentencepiece_proto


def build_sentencepiece_model(header: GgufHeader) -> bytes:
    """The content of `tokenizer.model`.

    Raises:
        CheckpointError: pieces, scores, kinds or ids that no such model has.
    """
    try:
        return sentencepiece_proto.build_sentencepiece_model(header.metadata)
    except ValueError as error:
        raise CheckpointError(f"{header.path}: {error}") from error


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
