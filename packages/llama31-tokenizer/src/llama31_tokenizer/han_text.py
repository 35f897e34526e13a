"""When Chinese text is encoded as such: texts in, ids out, or None where tiktoken does as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from llama31_tokenizer.spans import spans_of_size
from llama31_tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llama31_tokenizer.han_cuts import HanCuts
    from llama31_tokenizer.han_encoder import HanEncoder
    from llama31_tokenizer.joined_ids import JoinedIds

FEWEST_CHARS = 1500  # of a call: for fewer, thirty calls of NumPy take longer than tiktoken
_CHARS_PER_BUILD = 1_000_000  # of Chinese: from there on the cuts, 0.1 s and 9 MB, have paid for themselves
_CHARS_AT_ONCE = 1 << 17  # for which 5 MB are at work, within the processor's caches
_SAMPLES = 64
_MOST_UNMERGEABLE = 16  # tokens that every text is searched for; Llama 3 has one
_MOST_JOINED = 0.25  # of pairs that may not be cut, so that cutting is worth it; Llama 3 has 0.03
_CUTS: WeakKeyDictionary[Vocabulary, HanCuts] = WeakKeyDictionary()  # for all threads' tokenizers of a vocabulary


class HanText:
    """Encodes what is mostly Chinese, once there has been enough of it.

    Threads that call at the same time have an encoder each, 3 MB. There are no locks, which a fork could take along.

    Args:
        vocabulary: with ranks for every byte, and Llama 3's pre-tokeniser.
        encode_each: of any texts that are not long.
    """

    def __init__(self, vocabulary: Vocabulary, encode_each: Callable[[Sequence[str]], JoinedIds]) -> None:
        self._vocabulary, self._encode_each = vocabulary, encode_each
        self._num_chars = 0
        self._has_given_up = False
        self._idle: list[HanEncoder] = []

    def encode(self, texts: Sequence[str]) -> JoinedIds | None:
        """As `HanEncoder.encode`; None, too, for texts that tiktoken encodes as fast."""
        if self._has_given_up:
            return None
        num_chars = sum(map(len, texts))
        if num_chars < FEWEST_CHARS or not is_mostly_han("".join(texts)):
            return None
        self._num_chars += num_chars
        if self._num_chars < _CHARS_PER_BUILD:
            return None
        encoder = self._take_idle() or self._build()
        if encoder is None:
            return None
        from llama31_tokenizer.joined_ids import JoinedIds  # needs numpy, which takes time to import

        parts = [encoder.encode(texts[span]) for span in spans_of_size(texts, _CHARS_AT_ONCE)]
        self._idle.append(encoder)  # not after an interrupt, which may have left something half done
        found = [part for part in parts if part is not None]
        return JoinedIds.joined(found) if len(found) == len(parts) else None

    def _take_idle(self) -> HanEncoder | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _build(self) -> HanEncoder | None:
        from llama31_tokenizer.han_cuts import HanCuts
        from llama31_tokenizer.han_encoder import HanEncoder

        cuts = _CUTS.get(self._vocabulary)
        if cuts is None:
            cuts = _CUTS[self._vocabulary] = HanCuts(self._vocabulary.ranks)
        if len(cuts.unmergeable) > _MOST_UNMERGEABLE or cuts.joined_share > _MOST_JOINED:
            self._has_given_up = True
            return None
        return HanEncoder(cuts, self._encode_each)


def is_mostly_han(text: str, samples: int = _SAMPLES) -> bool:
    """Whether half of evenly spaced characters are Chinese ones."""
    if text.isascii():
        return False
    taken = text[:: max(1, len(text) // samples)]
    return 2 * sum("\u4e00" <= char <= "\u9fff" for char in taken) >= len(taken)
