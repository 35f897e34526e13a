"""BPE of one very long piece in linear time and little memory: bytes in, the ids tiktoken would give out.

tiktoken keeps a heap over the whole piece, which costs more than linear time once it outgrows the processor's caches
(10 MB of one letter: 21 times as long as 1 MB) and 40 bytes of memory a byte. Here windows of the piece are encoded
and joined. Why the joined ids are the same: BPE always applies the merge of lowest rank, leftmost first. If every two
neighbouring tokens x, y are what BPE makes of the bytes of xy alone, then no merge can ever cross the boundary between
them in the whole piece either, since the merges inside x and y happen there in the same order; so the sequence is the
BPE of the whole. Neighbours inside a window have that property; at a joint it is checked, and the joint is moved until
it holds.
"""

from __future__ import annotations

from collections.abc import Callable

WINDOW_BYTES = 1 << 16
STEP_CHARS = 1 << 16  # runs of twice as many characters are looked for; tiktoken takes shorter ones well
_OVERLAP_BYTES = 1 << 9

EncodePiece = Callable[[bytes], list[int]]


def encode_long_piece(
    data: bytes, encode: EncodePiece, token_bytes: Callable[[int], bytes], window: int = WINDOW_BYTES
) -> list[int]:
    """Ids of one piece.

    Args:
        data: the piece.
        encode: BPE of a short piece; a piece that is a token gives that token.
        token_bytes: bytes of an id.
        window: how much to encode at a time.
    """
    ids = encode(data[:window])
    end = min(window, len(data))
    overlap = min(_OVERLAP_BYTES, window // 2)
    while end < len(data):
        # The next window starts at a token's start, `back` bytes before what is encoded.
        kept, back = len(ids), 0
        while kept > 0 and back < overlap:
            kept -= 1
            back += len(token_bytes(ids[kept]))
        start = end - back
        stop = min(start + max(window, 2 * back), len(data))
        following = encode(data[start:stop])
        joint = _find_joint(ids, kept, following, encode, token_bytes)
        if joint is None:
            overlap *= 2  # at worst the next window holds all there is, from the piece's start on
            if kept == 0:
                ids, end = following, stop
            continue
        left, right = joint
        del ids[left:]
        ids += following[right:]
        end = stop
        overlap = min(_OVERLAP_BYTES, window // 2)
    return ids


def _find_joint(
    ids: list[int], kept: int, following: list[int], encode: EncodePiece, token_bytes: Callable[[int], bytes]
) -> tuple[int, int] | None:
    """How many of `ids` to keep and of `following` to skip, so that the tokens beside the joint are BPE's own."""
    if kept == 0:
        return None
    reach = sum(len(token_bytes(token)) for token in ids[kept:])
    starts: dict[int, int] = {}
    place = 0
    for right, token in enumerate(following):
        if place > reach:
            break
        starts[place] = right
        place += len(token_bytes(token))
    place = 0
    for left in range(kept, len(ids) + 1):
        if place in starts:
            right = starts[place]
            before, after = ids[left - 1], following[right]
            if encode(token_bytes(before) + token_bytes(after)) == [before, after]:
                return left, right
        if left < len(ids):
            place += len(token_bytes(ids[left]))
    return None
