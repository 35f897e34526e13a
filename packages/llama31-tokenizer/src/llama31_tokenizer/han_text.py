"""When Chinese text is encoded as such: texts in, arrays of ids out, or None where tiktoken does as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llama31_tokenizer.han_encoder import HanEncoder

FEWEST_CHARS = 1500  # of a call: for fewer, fifty calls of NumPy take longer than tiktoken
_CHARS_PER_BUILD = 1_000_000  # of Chinese: from there on the cuts, 0.07 s and 7 MB, have paid for themselves
_SAMPLES = 64
# NumPy's steps are so short that two threads taking turns at Python's global lock are hardly faster than one, while
# tiktoken works without it: so one thread cuts and looks up, and others leave their texts to tiktoken.
_ONE_AT_A_TIME = Lock()
_MOST_UNMERGEABLE = 16  # tokens that every text is searched for; Llama 3 has one
_MOST_JOINED = 0.25  # of pairs that may not be cut, so that cutting is worth it; Llama 3 has 0.02


class HanText:
    """Encodes what is mostly Chinese, once there has been enough of it, in one thread of a process at a time.

    Args:
        ranks: bytes of a token to its rank; the pre-tokeniser is Llama 3's.
        encode: of any text that is not long.
    """

    def __init__(self, ranks: Mapping[bytes, int], encode: Callable[[str], list[int]]) -> None:
        self._ranks, self._encode = ranks, encode
        self._num_chars = 0
        self._encoder: HanEncoder | None = None
        self._has_given_up = False

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]] | None:
        """As `HanEncoder.encode`; None, too, for texts that tiktoken encodes as fast,
        and while another thread is at it."""
        joined = "".join(texts)
        if self._has_given_up or len(joined) < FEWEST_CHARS or not is_mostly_han(joined):
            return None
        if not _ONE_AT_A_TIME.acquire(blocking=False):
            return None
        try:
            self._num_chars += len(joined)
            if self._encoder is None and self._num_chars >= _CHARS_PER_BUILD:
                self._build()
            return self._encoder.encode(texts) if self._encoder else None
        finally:
            _ONE_AT_A_TIME.release()

    def _build(self) -> None:
        from llama31_tokenizer.han_cuts import HanCuts  # these need numpy, which takes time to import
        from llama31_tokenizer.han_encoder import HanEncoder

        cuts = HanCuts(self._ranks)
        if len(cuts.unmergeable) <= _MOST_UNMERGEABLE and cuts.joined_share <= _MOST_JOINED:
            self._encoder = HanEncoder(cuts, self._encode)
        else:
            self._has_given_up = True


def is_mostly_han(text: str) -> bool:
    """Whether half of evenly spaced characters are Chinese ones."""
    if text.isascii():
        return False
    taken = text[:: max(1, len(text) // _SAMPLES)]
    return 2 * sum("\u4e00" <= char <= "\u9fff" for char in taken) >= len(taken)
