"""Byte-level BPE over tiktoken: text in, ids out, and back; control tokens are never read from a text here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import tiktoken

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.fast_engine import Engine, FastEngine
from llama31_tokenizer.han_text import FEWEST_CHARS, HanText
from llama31_tokenizer.long_pieces import STEP_CHARS, WINDOW_BYTES, encode_long_piece
from llama31_tokenizer.meta_splits import MAX_RUN, split_as_meta
from llama31_tokenizer.patterns import LLAMA3
from llama31_tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llama31_tokenizer.joined_ids import JoinedIds
    from llama31_tokenizer.offsets import OffsetEncoding


class BpeCodec:
    """Encodes and decodes with one vocabulary.

    Args:
        vocabulary: with ranks and a pattern.
        engine: what encodes ordinary text; the ids are the same.
    """

    def __init__(self, vocabulary: Vocabulary, engine: Engine = "tiktoken") -> None:
        assert vocabulary.pattern is not None
        # tiktoken panics on a byte without a rank: give those ranks behind the vocabulary and take them out again.
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in vocabulary.ranks)
        self._size = vocabulary.size
        ranks = vocabulary.ranks
        if self._missing:
            ranks = {**ranks, **{bytes([byte]): self._size + at for at, byte in enumerate(self._missing)}}
        self._unknown_id = vocabulary.unknown_byte_id
        self._literal_ids = vocabulary.literal_tokens
        self._literals = compile_names(vocabulary.literal_tokens) if vocabulary.literal_tokens else None
        self._normalization = vocabulary.normalization
        self._encoding = tiktoken.Encoding(
            vocabulary.pattern.name,
            pat_str=vocabulary.pattern.regex,
            mergeable_ranks=ranks,
            special_tokens={**vocabulary.literal_tokens, **vocabulary.special_tokens},
        )
        self._fast = FastEngine(vocabulary) if engine == "fastokens" else None
        self._han = None
        if vocabulary.pattern == LLAMA3 and not (self._fast or self._missing):
            self._han = HanText(vocabulary, self._encode_each)
        self._separator = _find_separator(vocabulary)
        self._pattern = vocabulary.pattern.regex
        self._cuts = vocabulary.cuts_long_texts
        self._is_plain = not (self._missing or self._literals or self._normalization or self._cuts)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; what looks like a control token is text."""
        if self._is_plain:
            return self._encode_ordinary(text)
        if self._cuts and len(text) > MAX_RUN:
            return [token for part in split_as_meta(text) for token in self._encode_part(part)]
        return self._encode_part(text)

    def _encode_part(self, text: str) -> list[int]:
        if self._normalization:
            text = unicodedata.normalize(self._normalization, text)
        if not self._literals:
            return self._encode_between(text)
        ids: list[int] = []
        end = 0
        for match in self._literals.finditer(text):
            ids += self._encode_between(text[end : match.start()])
            ids.append(self._literal_ids[match.group()])
            end = match.end()
        return ids + self._encode_between(text[end:])

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text as an array, without a list in between where that can be."""
        import numpy as np

        if self._is_plain and not _has_long_run(text):
            if self._fast:
                return self._fast.encode_to_numpy(text)
            if len(text) >= FEWEST_CHARS and self._han and (found := self._han.encode([text])):
                return found.ids
            try:
                return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
            except UnicodeEncodeError:
                pass  # a lone surrogate, which only tiktoken's list form replaces
        return np.array(self.encode(text), np.int32)

    def encode_joined(self, texts: Sequence[str]) -> JoinedIds | None:
        """Ids of many texts, from one call of the engine; None where that cannot be."""
        if not self._is_plain or any(map(_has_long_run, texts)):
            return None
        if self._fast:
            return self._fast.encode_joined(texts)
        if self._han and (found := self._han.encode(texts)):
            return found
        return self._encode_separated(texts)

    def _encode_each(self, texts: Sequence[str]) -> JoinedIds:
        if found := self._encode_separated(texts):
            return found
        import numpy as np

        from llama31_tokenizer.joined_ids import JoinedIds

        lists = [self._encoding.encode_ordinary(text) for text in texts]
        ids = np.array([token for one in lists for token in one], np.int32)
        return JoinedIds.end_to_end(ids, np.array(list(map(len, lists))))

    def _encode_separated(self, texts: Sequence[str]) -> JoinedIds | None:
        """With a control token between texts, which parts them for tiktoken as separate calls would."""
        if not self._separator:
            return None
        import numpy as np

        from llama31_tokenizer.joined_ids import JoinedIds

        name, separator_id = self._separator
        try:
            ids = self._encoding.encode_to_numpy(name.join(texts), allowed_special={name}, disallowed_special=())
        except UnicodeEncodeError:
            return None
        found = JoinedIds.separated(ids.view(np.int32), separator_id)
        # There may be no texts at all, or one with the control token's name in it.
        return found if len(found.starts) == len(texts) else None

    def _encode_ordinary(self, text: str) -> list[int]:
        if len(text) < 2 * STEP_CHARS:
            return self._encode_short(text)
        from llama31_tokenizer.long_runs import encode_around_runs  # needs regex, which takes time to import

        text = replace_surrogates(text)
        return encode_around_runs(text, self._pattern, self._encode_short, self._encode_piece)

    def _encode_short(self, text: str) -> list[int]:
        if self._fast:
            return self._fast.encode(text)
        if len(text) >= FEWEST_CHARS and self._han and (found := self._han.encode([text])):
            return found.to_lists(self._size)[0]
        return self._encoding.encode_ordinary(text)

    def _encode_piece(self, piece: str) -> list[int]:
        return self._encode_piece_bytes(piece.encode())

    def _encode_piece_bytes(self, data: bytes) -> list[int]:
        encode = self._encoding._encode_single_piece
        if len(data) <= WINDOW_BYTES:
            return encode(data)
        return encode_long_piece(data, encode, self._encoding.decode_single_token_bytes)

    def _encode_between(self, text: str) -> list[int]:
        if not self._missing:
            return self._encode_ordinary(text)
        text = replace_surrogates(text)
        data = text.encode()
        if len(data.translate(None, self._missing)) == len(data):
            return self._encode_ordinary(text)
        return self._encode_with_missing_bytes(text)

    def _encode_with_missing_bytes(self, text: str) -> list[int]:
        """As Hugging Face's BPE does: inside a piece, what has no token is left out (its neighbours may merge)."""
        import regex  # type: ignore[import-untyped]  # a dependency of tiktoken's

        from llama31_tokenizer.unicode_classes import with_stand_ins

        ids: list[int] = []
        gap = re.compile(b"([" + re.escape(self._missing) + b"])")
        for piece in regex.finditer(self._pattern, with_stand_ins(text)):
            data = text[piece.start() : piece.end()].encode()
            kept = [data.translate(None, self._missing)] if self._unknown_id is None else gap.split(data)
            for part in kept:
                if part and part in self._missing and self._unknown_id is not None:
                    ids.append(self._unknown_id)
                elif part:
                    ids += self._encode_piece_bytes(part)
        return ids

    def encode_with_offsets(self, text: str) -> OffsetEncoding:
        """Ids with their places in the text.

        Raises:
            TokenizerError: the text is not in the vocabulary's Unicode form, or has a lone surrogate, so that places in
                it would not be those of the tokens.
        """
        from llama31_tokenizer.offsets import locate_tokens

        if self._normalization and not unicodedata.is_normalized(self._normalization, text):
            raise TokenizerError(
                f"text is not in {self._normalization}, this vocabulary's form; normalise it before asking for offsets"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text has a lone surrogate at character {error.start}; replace it before asking for offsets"
            ) from error
        if (
            self._missing
            and self._unknown_id is not None
            and len(text.encode().translate(None, self._missing)) < len(text.encode())
        ):
            raise TokenizerError("text has bytes without a token, whose places cannot be told")
        ids = self.encode(text)
        return locate_tokens(text, ids, self._encoding.decode_tokens_bytes(ids), self._missing)

    def decode_bytes(self, ids: Sequence[int], *, continuing: bool = False) -> bytes:
        """Bytes of the tokens, one after the other; `continuing` makes no difference to this kind of vocabulary.

        Raises:
            TokenizerError: an id that no token has.
        """
        if self._missing and max(ids, default=0) >= self._size:
            raise TokenizerError(self._describe_bad_id(ids))
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            raise TokenizerError(self._describe_bad_id(ids)) from error

    def _describe_bad_id(self, ids: Sequence[int]) -> str:
        for index, token_id in enumerate(ids):
            try:
                known = token_id < self._size and self._encoding.decode_single_token_bytes(token_id) is not None
            except (KeyError, OverflowError):
                known = False
            if not known:
                return f"ids[{index}] is {token_id}, no token has that id; allowed are 0 to {self._size - 1}"
        raise AssertionError("tiktoken refused ids that it decodes one by one")


def _find_separator(vocabulary: Vocabulary) -> tuple[str, int] | None:
    """A control token that cannot begin in the end of a text, with one "<", where it begins, nor begins another one.

    The last such, which in Llama 3 is one kept for later: texts about models have the names of the others.
    """
    names = [*vocabulary.special_tokens, *vocabulary.literal_tokens]
    for name, token_id in reversed(list(vocabulary.special_tokens.items())):
        if name.rfind("<") == 0 and len(name) > 1 and sum(other.startswith(name) for other in names) == 1:
            return name, token_id
    return None


def _has_long_run(text: str) -> bool:
    if len(text) < 2 * STEP_CHARS:
        return False
    from llama31_tokenizer.long_runs import find_long_run  # needs regex, which takes time to import

    return find_long_run(replace_surrogates(text), 0, STEP_CHARS) is not None


def compile_names(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the names, the longest first, so that a name that begins another does not hide it."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))))


def replace_surrogates(text: str) -> str:
    """The text with pairs of surrogates joined and lone ones as U+FFFD, as tiktoken encodes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
