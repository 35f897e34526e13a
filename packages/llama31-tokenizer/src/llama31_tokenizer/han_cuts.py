"""Where a text may be cut beside Han characters without changing its ids: UTF-16 in, places out.

A cut is safe in two places. Where a piece of Llama 3's pre-tokeniser ends: its pieces are encoded one by one anyway.
And inside a piece of letters, between two characters that no token of the vocabulary reaches across: a merge makes a
token, so no merge ever crosses that place, and the parts on both sides are merged as if each were alone. Three in four
neighbouring Han characters of real Chinese are such places.

One thing would be different: a piece that is a token gets that token even where merging would not arrive at it. A part
of a piece must not, so texts that hold such a token, with Han characters in it or of one character, are left alone
(`unmergeable`).

Shapes: N UTF-16 code units of a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import tiktoken

BREAK = 0xFFFF  # a unit that no text has (Unicode keeps it free); what stands on both sides are separate texts

_Units = npt.NDArray[np.uint16]
_Indexes = npt.NDArray[np.intp]

# Classes of units. The pattern sees letters, numbers, line ends, white space and others; Han characters are letters.
_UNKNOWN, _HAN, _LETTER, _NUMBER, _LINE_END, _SPACE, _OTHER = range(7)
_HAN_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF))

# A pair's place in the table: what its left unit is, what its right one is, and a hash of the units that matter (Han
# characters, and others on the left). Two pairs may share a place, which then only leaves a cut out.
_HASH_BITS = 19
_AFTER_ANY, _AFTER_HAN, _AFTER_OTHER, _AFTER_EDGE = range(4)  # edges: numbers, line ends, breaks
_BEFORE_ANY, _BEFORE_HAN, _BEFORE_LETTER, _BEFORE_BREAK = range(4)

# Inside a token (0xFF parts them): a character, or the end of one, in front of a Han character or the start of one.
_NEIGHBOURS = re.compile(
    rb"(?=((?<=\xff)[\x80-\xbf]{1,2}|[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]"
    rb"|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf])"
    rb"([\xe3-\xe9][\x80-\xbf]{0,2})(?![\x80-\xbf]))"
)


class HanCuts:
    """The safe cuts of one vocabulary with Llama 3's pre-tokeniser.

    Args:
        ranks: bytes of a token to its rank.

    Attributes:
        joined_share: of pairs of Han characters, how many are not cut.
        unmergeable: tokens that merging does not arrive at and that a part of a piece could be; a text that has one
            must not be cut.
    """

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        classes = _classify()
        some = [token for token in ranks if not token.isascii()]
        lefts, rights = _halves_of_places(classes)
        self._halves = (lefts << 32 | rights).astype(np.int64)
        self._is_cut = np.zeros(16 << _HASH_BITS, np.bool_)
        by_kinds = self._is_cut.reshape(4, 4, -1)
        by_kinds[_AFTER_HAN, [_BEFORE_HAN, _BEFORE_ANY]] = by_kinds[[_AFTER_OTHER, _AFTER_EDGE], _BEFORE_HAN] = True
        for left, right in _joined_characters(some, classes):
            self._is_cut[lefts[left] ^ rights[right]] = False
        by_kinds[:, _BEFORE_BREAK] = True
        self._is_cut[lefts[BREAK] ^ rights] = True
        self.joined_share = 1 - float(by_kinds[_AFTER_HAN, _BEFORE_HAN].mean())
        self.unmergeable = sorted(_unmergeable(some, ranks))

    def find(self, units: _Units) -> _Indexes:
        """Places of cuts, from 0 to N, both among them. On both sides of a BREAK there is one.

        Few and long steps, between which other threads run: five of NumPy's, each over the whole text.
        """
        halves = self._halves.take(units).view(np.int32)  # rights and lefts
        pairs = np.bitwise_xor(halves[1:-2:2], halves[2::2], dtype=np.intp)
        cuts = np.empty(len(units) + 1, np.bool_)
        cuts[[0, -1]] = True
        self._is_cut.take(pairs, out=cuts[1:-1], mode="clip")
        return np.flatnonzero(cuts)


def _halves_of_places(classes: npt.NDArray[np.uint8]) -> tuple[_Indexes, _Indexes]:
    """What each unit gives to a pair's place when it is the left and the right one."""
    hashes = np.random.default_rng(0).integers(0, 1 << _HASH_BITS, (2, len(classes)))
    is_han, is_other = classes == _HAN, classes == _OTHER
    after = np.select(
        [is_han, is_other, np.isin(classes, [_NUMBER, _LINE_END])], [_AFTER_HAN, _AFTER_OTHER, _AFTER_EDGE]
    )
    before = np.select([is_han, np.isin(classes, [_LETTER, _UNKNOWN])], [_BEFORE_HAN, _BEFORE_LETTER])
    lefts = np.where(is_han | is_other, hashes[0], 0) | after << _HASH_BITS + 2
    rights = np.where(is_han, hashes[1], 0) | before << _HASH_BITS
    lefts[BREAK] = _AFTER_EDGE << _HASH_BITS + 2 | 1  # unlike other edges', for there is a cut whatever comes
    rights[BREAK] = _BEFORE_BREAK << _HASH_BITS
    return lefts, rights


def _classify() -> npt.NDArray[np.uint8]:
    """The class of every unit, as tiktoken's own expressions see it."""
    characters = "".join(chr(unit) for unit in range(1, BREAK) if not 0xD800 <= unit < 0xE000)
    classes = np.full(BREAK + 1, _OTHER, np.uint8)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for expression, one in ((r"\p{L}", _LETTER), (r"\p{N}", _NUMBER), (r"\s", _SPACE)):
        probe = tiktoken.Encoding(expression, pat_str=expression, mergeable_ranks=ranks, special_tokens={})
        found = bytes(probe.encode_ordinary(characters)).decode()
        classes[np.frombuffer(found.encode("utf-16-le"), "<u2")] = one
    for first, last in _HAN_RANGES:
        part = classes[first : last + 1]
        part[part == _LETTER] = _HAN
    classes[0xD800:0xE000] = classes[[0, BREAK]] = _UNKNOWN
    classes[[10, 13]] = _LINE_END
    return classes


def _joined_characters(tokens: Iterable[bytes], classes: npt.NDArray[np.uint8]) -> Iterator[tuple[_Indexes, _Indexes]]:
    """Characters that may be cut from a Han character behind them, and these, where a token reaches across."""
    pairs = set(_NEIGHBOURS.findall(b"\xff" + b"\xff".join(tokens) + b"\xff"))
    whole = {(left, right) for left, right in pairs if left[0] & 0xC0 != 0x80 and len(right) == 3}
    yield (
        np.array([ord(left.decode()) for left, _ in whole], np.intp),
        np.array([ord(right.decode()) for _, right in whole], np.intp),
    )
    before_cuts = np.flatnonzero((classes == _HAN) | (classes == _OTHER))
    han = np.flatnonzero(classes == _HAN)
    for left, right in pairs - whole:
        yield _ending_with(left, before_cuts)[:, None], _beginning_with(right, han)


def _ending_with(end: bytes, units: _Indexes) -> _Indexes:
    """Which of the units' characters end with a character, or the last bytes of one."""
    if end[0] & 0xC0 != 0x80:
        chosen = units == ord(end.decode())
    elif len(end) == 1:
        chosen = (units >= 0x80) & (units & 0x3F == end[0] & 0x3F)
    else:
        chosen = (units >= 0x800) & (units & 0xFFF == (end[0] & 0x3F) << 6 | end[1] & 0x3F)
    return np.extract(chosen, units)


def _beginning_with(begin: bytes, units: _Indexes) -> _Indexes:
    """Which of the units' characters, of three bytes each, begin with one to three bytes."""
    value = begin[0] & 0xF
    for byte in begin[1:]:
        value = value << 6 | byte & 0x3F
    return np.extract(units >> 6 * (3 - len(begin)) == value, units)


def _unmergeable(tokens: Iterable[bytes], ranks: Mapping[bytes, int]) -> Iterator[str]:
    has_han = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _HAN_RANGES) + "]")
    for token in tokens:
        text = token.decode("utf-8", "ignore")
        if text.encode() == token and (len(text) == 1 or has_han.search(text)) and not _is_merged(token, ranks):
            yield text


def _is_merged(token: bytes, ranks: Mapping[bytes, int]) -> bool:
    """Whether merging a token's bytes, lowest rank first, leftmost among equals, arrives at the token."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(parts[at] + parts[at + 1], math.inf), at) for at in range(len(parts) - 1))
        if rank == math.inf:
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True
