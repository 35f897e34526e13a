"""Into which pieces training cuts its work: tests hold these equal to what `training.head` and `.attention` do, which
cannot be imported without MindSpore."""

from __future__ import annotations


def head_chunk(vocab_size: int, tokens: int) -> int:
    """Tokens whose logits exist at once: 128 MiB of them, between 64 and 512, and no more than there are."""
    return min(max(64, min(512, (1 << 25) // vocab_size // 64 * 64)), tokens)


def query_key_pairs(tokens: int) -> int:
    """Scores of a head and sequence that are computed: at most 8 blocks of 128 queries or more, each over its keys."""
    size = max(128, -(-tokens // 8))
    stops = [min(start + size, tokens) for start in range(0, tokens, size)]
    return sum((stop - start) * stop for start, stop in zip(range(0, tokens, size), stops, strict=True))
