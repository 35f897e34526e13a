"""What a tokenizer file holds, read and checked: the value every reader makes and every codec is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama31_tokenizer.patterns import Pattern

FileKind = Literal["tiktoken", "hf-json", "gguf", "sentencepiece"]
Normalization = Literal["NFC", "NFD", "NFKC", "NFKD"]


@dataclass(frozen=True)
class ControlTokens:
    """Ids with a role, and what the file says about adding them.

    Attributes:
        stop_ids: ids that end a generation, the end-of-text one included.
        add_bos, add_eos: what `Tokenizer.__call__` does unless told otherwise.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    add_bos: bool = False
    add_eos: bool = False


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A byte-level BPE vocabulary, or a SentencePiece model that its library reads; equal only to itself.

    Attributes:
        kind: what the file was.
        source: the file.
        sha256: of that file.
        size: one more than the largest id.
        ranks: bytes of a token to its id, which is its merge rank too; empty for SentencePiece.
        special_tokens: control tokens by name; plain text in user input unless the caller allows them.
        literal_tokens: tokens that always match in a text (`special: false` added tokens, GGUF user-defined ones).
        pattern: pre-tokeniser; None for SentencePiece.
        normalization: Unicode form the file asks for.
        unknown_byte_id: id for a byte that has no token; None drops it, as Hugging Face's and llama.cpp's BPE do.
        sentencepiece_model: the serialized model.
        cuts_long_texts: cut them where Meta's Tokenizer does.
    """

    kind: FileKind
    source: Path
    sha256: str
    size: int
    ranks: dict[bytes, int]
    special_tokens: Mapping[str, int]
    controls: ControlTokens
    pattern: Pattern | None
    literal_tokens: Mapping[str, int] = field(default_factory=dict)
    normalization: Normalization | None = None
    unknown_byte_id: int | None = None
    chat_template: str | None = None
    sentencepiece_model: bytes | None = None
    cuts_long_texts: bool = False
