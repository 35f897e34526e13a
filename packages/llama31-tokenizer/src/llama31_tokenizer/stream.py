"""Decoding ids as they are generated: ids in, the text that is certain by now out."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from llama31_tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Turns a stream of ids into text that never ends inside a character.

    The pieces, `flush()` included, joined are `tokenizer.decode` of all the ids.

    Args:
        tokenizer: whose ids these are.
        skip_special_tokens: leave control tokens out, as for a user's eyes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        self._started = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Text completed by these ids; bytes of an unfinished character wait for the next call.

        Raises:
            TokenizerError: an id out of range.
        """
        ids = [ids] if isinstance(ids, int) else list(ids)
        data = self._tokenizer.decode_bytes(ids, skip_special_tokens=self._skip, continuing=self._started)
        self._started = self._started or any(token not in self._special_ids for token in ids)
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the decoder is then ready for another stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._started = False
        return rest
