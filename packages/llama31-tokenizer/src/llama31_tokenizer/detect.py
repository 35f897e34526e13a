"""What kind of vocabulary a file holds, from its first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.gguf_metadata import MAGIC
from llama31_tokenizer.vocabulary import FileKind

_HEAD_BYTES = 4096
_RANK_LINE = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} \d+(\r?\n|$)")
# SentencePiece's ModelProto opens with field 1, a piece, whose first field is its text.
_SENTENCEPIECE = re.compile(rb"\x0a[\x03-\x7f]\x0a", re.DOTALL)
_OTHERS = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (re.compile(rb"\s*<(!DOCTYPE|html)", re.IGNORECASE), "an HTML page, probably a failed download; fetch it again"),
    (re.compile(rb"PK\x03\x04"), "a zip archive (a PyTorch checkpoint?); give the tokenizer file beside it"),
    (re.compile(rb".{8}\{\"", re.DOTALL), "a safetensors checkpoint; give the tokenizer file beside it"),
    (re.compile(rb"$"), "an empty file; fetch it again"),
)


def detect_kind(path: Path) -> FileKind:
    """The kind of vocabulary in a file.

    Raises:
        TokenizerError: none that this package reads; the message says what the file looks like.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(MAGIC):
        return "gguf"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return "hf-json"
    if _RANK_LINE.match(head):
        return "tiktoken"
    if _SENTENCEPIECE.match(head):
        return "sentencepiece"
    guess = next((what for pattern, what in _OTHERS if pattern.match(head)), f"its first bytes are {head[:12]!r}")
    raise TokenizerError(
        f"{path}: not a tokenizer file: {guess}; expected tiktoken ranks, a Hugging Face tokenizer.json, "
        "a GGUF model or a SentencePiece model"
    )
