"""Into which pieces training cuts a batch: sizes in, sizes out. No MindSpore, so that `plan` counts with the same."""

from __future__ import annotations

from collections.abc import Iterator

_CHUNK_LOGITS = 1 << 25  # 128 MiB of float32
_MAX_CHUNK = 512
_MIN_CHUNK = 64
_MIN_BLOCK = 128
_MAX_BLOCKS = 8


def chunk_size(vocab_size: int, tokens: int) -> int:
    """Tokens whose logits exist at once: as many as 128 MiB of them hold, between 64 and 512, and no more than there
    are."""
    fitting = max(_MIN_CHUNK, min(_MAX_CHUNK, _CHUNK_LOGITS // vocab_size // _MIN_CHUNK * _MIN_CHUNK))
    return min(fitting, tokens)


def query_blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the queries that are computed together: at most 8 blocks, of 128 or more."""
    size = max(_MIN_BLOCK, -(-tokens // _MAX_BLOCKS))
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def query_key_pairs(tokens: int) -> int:
    """Scores of a head and sequence that blocks of queries compute, each over the keys up to its end."""
    return sum((stop - start) * stop for start, stop in query_blocks(tokens))
