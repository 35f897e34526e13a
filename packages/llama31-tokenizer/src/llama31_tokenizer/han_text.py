"""When Chinese text is encoded as such: texts in, ids out, or None where tiktoken does as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from llama31_tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llama31_tokenizer.han_cuts import HanCuts
    from llama31_tokenizer.han_encoder import HanEncoder
    from llama31_tokenizer.joined_ids import JoinedIds

FEWEST_CHARS = 1500  # of a call: for fewer, fifty calls of NumPy take longer than tiktoken
_CHARS_PER_BUILD = 1_000_000  # of Chinese: from there on the cuts, 0.07 s and 7 MB, have paid for themselves
_SAMPLES = 64
_MOST_UNMERGEABLE = 16  # tokens that every text is searched for; Llama 3 has one
_MOST_JOINED = 0.25  # of pairs that may not be cut, so that cutting is worth it; Llama 3 has 0.02


_CUTS: WeakKeyDictionary[Vocabulary, HanCuts] = WeakKeyDictionary()  # for all threads' tokenizers of a vocabulary
_CUTS_LOCK = Lock()


class HanText:
    """Encodes what is mostly Chinese, once there has been enough of it, in one thread at a time.

    Args:
        vocabulary: with ranks for every byte, and Llama 3's pre-tokeniser.
        encode_each: of any texts that are not long.
    """

    def __init__(self, vocabulary: Vocabulary, encode_each: Callable[[Sequence[str]], JoinedIds]) -> None:
        self._vocabulary, self._encode_each = vocabulary, encode_each
        self._num_chars = 0
        self._encoder: HanEncoder | None = None
        self._has_given_up = False
        self._busy = Lock()

    def encode(self, texts: Sequence[str]) -> JoinedIds | None:
        """As `HanEncoder.encode`; None, too, for texts that tiktoken encodes as fast,
        and while another thread is at it."""
        num_chars = sum(map(len, texts))
        if self._has_given_up or num_chars < FEWEST_CHARS or not is_mostly_han("".join(texts)):
            return None
        if not self._busy.acquire(blocking=False):
            return None
        try:
            self._num_chars += num_chars
            if self._encoder is None and self._num_chars >= _CHARS_PER_BUILD:
                self._build()
            return self._encoder.encode(texts) if self._encoder else None
        finally:
            self._busy.release()

    def _build(self) -> None:
        from llama31_tokenizer.han_encoder import HanEncoder  # needs numpy, which takes time to import

        cuts = _cuts_of(self._vocabulary)
        if len(cuts.unmergeable) <= _MOST_UNMERGEABLE and cuts.joined_share <= _MOST_JOINED:
            self._encoder = HanEncoder(cuts, self._encode_each)
        else:
            self._has_given_up = True


def _cuts_of(vocabulary: Vocabulary) -> HanCuts:
    from llama31_tokenizer.han_cuts import HanCuts

    with _CUTS_LOCK:
        if vocabulary not in _CUTS:
            _CUTS[vocabulary] = HanCuts(vocabulary.ranks)
        return _CUTS[vocabulary]


def is_mostly_han(text: str, samples: int = 64) -> bool:
    """Whether half of evenly spaced characters are Chinese ones."""
    if text.isascii():
        return False
    taken = text[:: max(1, len(text) // samples)]
    return 2 * sum("\u4e00" <= char <= "\u9fff" for char in taken) >= len(taken)
