"""tiktoken rank files: bytes of a `tokenizer.model` in, checked ranks out, and back.

One line a token: its bytes in base64, a space, its rank. Line number n must hold rank n, which the format's writers
(tiktoken, Meta) always produce; so a truncated, reordered or edited file is an error that names the line.
"""

from __future__ import annotations

import binascii
import itertools
from pathlib import Path

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.llama3 import GENUINE_SHA256, NUM_RANKS


def parse_ranks(data: bytes, source: Path, sha256: str) -> dict[bytes, int]:
    """Ranks of a Llama 3 vocabulary file.

    Args:
        data: the file's bytes.
        source: its path, for messages.
        sha256: of `data`; the genuine file has been checked once and is only decoded.

    Raises:
        TokenizerError: a line that is not base64 and a rank, a duplicate or missing rank, or not 128,000.
    """
    fields = data.split()
    if sha256 == GENUINE_SHA256:
        return dict(zip(map(binascii.a2b_base64, fields[::2]), itertools.count()))
    return _parse_checked(data, source)


def _parse_checked(data: bytes, source: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        where = f"{source}:{number}"
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            raise TokenizerError(
                f"{where}: got {_show(line)}, expected 'base64 rank' on each line; "
                "the file is damaged or not a tiktoken vocabulary, fetch it again"
            )
        try:
            token = binascii.a2b_base64(parts[0], strict_mode=True)
        except binascii.Error as error:
            raise TokenizerError(
                f"{where}: {_show(parts[0])} is not base64 ({error}); the file is damaged, fetch it again"
            ) from error
        if not token:
            raise TokenizerError(f"{where}: an empty token, expected at least one byte; fetch the file again")
        rank = int(parts[1])
        if rank != len(ranks):
            problem = "is a duplicate" if rank < len(ranks) else "comes too early"
            raise TokenizerError(
                f"{where}: rank {rank} {problem}, expected {len(ranks)}; the file is damaged, fetch it again"
            )
        if ranks.setdefault(token, rank) != rank:
            raise TokenizerError(
                f"{where}: token {token!r} has rank {ranks[token]} already and {rank} here; fetch the file again"
            )
    if len(ranks) != NUM_RANKS:
        raise TokenizerError(
            f"{source}: {len(ranks):,} ranks, a Llama 3 vocabulary has {NUM_RANKS:,}; the file is truncated or belongs "
            "to another model, whose tokenizer.json would be needed"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{source}: no rank for byte 0x{missing[0]:02x}, expected one for each of the 256")
    return ranks


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The tiktoken file of a vocabulary."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(binascii.b2a_base64(token, newline=False) + b" %d\n" % rank for token, rank in ordered)


def _show(line: bytes) -> str:
    return repr(line if len(line) <= 60 else line[:60] + b"...")
