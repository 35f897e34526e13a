"""The tokenizer people use: files in, `encode` and `decode` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from llama31_tokenizer import llama3
from llama31_tokenizer.bpe import BpeCodec
from llama31_tokenizer.compat import Compat, make_compatible
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.fast_engine import Engine, check_engine
from llama31_tokenizer.loading import load_directory, load_vocabulary
from llama31_tokenizer.special_text import SpecialSet, encode_with_special
from llama31_tokenizer.vocabulary import Vocabulary
from llama31_tokenizer.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llama31_tokenizer.batch import Side
    from llama31_tokenizer.call import BatchEncoding, Padding, TensorType, Truncation
    from llama31_tokenizer.joined_ids import JoinedIds
    from llama31_tokenizer.offsets import OffsetEncoding
    from llama31_tokenizer.sentencepiece_model import SentencePieceCodec

_NONE: frozenset[str] = frozenset()


class Tokenizer:
    """Text to ids and back with one vocabulary.

    Text that looks like a control token (`<|eot_id|>`) is plain text unless the caller allows it by name, so what a
    user types cannot end a turn or open another; `ChatFormat` inserts control ids itself.

    Attributes:
        vocabulary: what was read from the file.
        engine: what encodes ordinary text.
        vocab_size: one more than the largest id.
        bos_id, eos_id, pad_id, eot_id, eom_id: ids, or None where the vocabulary has none.
        stop_ids: ids that end a generation.
        special_tokens: control tokens, name to id.
        sha256: of the vocabulary file (of a GGUF file: of its key-value header).
        workers: the threads of `encode_batch` and `count_batch`.
    """

    def __init__(self, vocabulary: Vocabulary, engine: Engine = "tiktoken") -> None:
        check_engine(engine, vocabulary)
        self.vocabulary, self.engine = vocabulary, engine
        self._codec: BpeCodec | SentencePieceCodec
        if vocabulary.sentencepiece_model is None:
            self._codec = BpeCodec(vocabulary, engine)
        else:
            from llama31_tokenizer.sentencepiece_model import SentencePieceCodec

            self._codec = SentencePieceCodec(vocabulary)
        self.vocab_size = vocabulary.size
        self.bos_id = vocabulary.controls.bos_id
        self.eos_id = vocabulary.controls.eos_id
        self.pad_id = vocabulary.controls.pad_id
        self.eot_id = vocabulary.special_tokens.get(llama3.EOT)
        self.eom_id = vocabulary.special_tokens.get(llama3.EOM)
        self.stop_ids = vocabulary.controls.stop_ids
        self.special_tokens: Mapping[str, int] = MappingProxyType(dict(vocabulary.special_tokens))
        self.sha256 = vocabulary.sha256
        self._special_ids = frozenset(self.special_tokens.values())
        self.workers = Workers()

    @classmethod
    def from_file(
        cls, path: str | PathLike[str], *, compat: Compat | None = None, engine: Engine = "tiktoken"
    ) -> Tokenizer:
        """From one file: tiktoken ranks, a tokenizer.json, a GGUF or SentencePiece model, told apart by content.

        Args:
            path: the file.
            compat: "mindformers" normalises to NFC, pads with 128002 and adds no bos when called, as its Llama 3
                tokenizer does; "meta" cuts texts of more than 25,000 characters where Meta's does. None does neither.
            engine: "fastokens" (extra `fast`) gives the same ids faster and takes seconds to load, for bulk work.

        Raises:
            TokenizerError: none of these, or damaged; the message says where.
        """
        return cls(make_compatible(load_vocabulary(Path(path)), compat), engine)

    @classmethod
    def from_pretrained(
        cls, directory: str | PathLike[str], *, compat: Compat | None = None, engine: Engine = "tiktoken"
    ) -> Tokenizer:
        """From a model directory, whose tokenizer_config.json, chat template and generation_config.json count too.

        Args:
            directory: of the model.
            compat, engine: as in `from_file`.

        Raises:
            TokenizerError: no such directory, or no file in it that holds a vocabulary.
        """
        return cls(make_compatible(load_directory(Path(directory)), compat), engine)

    def save_pretrained(self, directory: str | PathLike[str]) -> list[Path]:
        """Write the files that `from_pretrained` and `transformers.AutoTokenizer` load, with the same ids.

        Raises:
            TokenizerError: the directory cannot be written.
        """
        from llama31_tokenizer.save import save_vocabulary

        return save_vocabulary(self.vocabulary, Path(directory))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Vocabulary, Engine]]:
        return type(self), (self.vocabulary, self.engine)  # so that processes of a data job can be handed one

    def __repr__(self) -> str:
        return (
            f"Tokenizer({str(self.vocabulary.source)!r}, kind={self.vocabulary.kind!r}, vocab_size={self.vocab_size})"
        )

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: SpecialSet = _NONE,
        disallowed_special: SpecialSet = _NONE,
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: any string; a lone surrogate counts as U+FFFD.
            bos: put the beginning-of-text id in front.
            eos: put the end-of-text id behind.
            allowed_special: control tokens whose names in the text become their ids, or "all". Only for text you wrote.
            disallowed_special: control tokens whose names in the text raise, or "all" for those not allowed.

        Raises:
            TokenizerError: a disallowed name in the text, an unknown name in a set, or bos/eos the vocabulary lacks.
        """
        if allowed_special or disallowed_special:
            ids = encode_with_special(
                text, self._codec.encode, self.special_tokens, allowed_special, disallowed_special
            )
        else:
            ids = self._codec.encode(text)
        return self.with_ends(ids, bos=bos, eos=eos) if bos or eos else ids

    def with_ends(self, ids: list[int], *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids with the beginning- and end-of-text ids around them."""
        if bos:
            ids.insert(0, self._required(self.bos_id, "bos"))
        if eos:
            ids.append(self._required(self.eos_id, "eos"))
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: SpecialSet = _NONE,
        disallowed_special: SpecialSet = _NONE,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` of each text, in threads (as many as the process has cores, unless told otherwise)."""
        from llama31_tokenizer.threads import encode_texts, map_groups

        if allowed_special or disallowed_special:
            encode = partial(Tokenizer.encode, allowed_special=allowed_special, disallowed_special=disallowed_special)
            rows = map_groups(lambda own, group: [encode(own, text) for text in group], self, texts, num_threads)
        else:
            rows = encode_texts(self, texts, num_threads)
        return [self.with_ends(ids, bos=bos, eos=eos) for ids in rows] if bos or eos else rows

    def encode_to_numpy(self, text: str, *, bos: bool = False, eos: bool = False) -> npt.NDArray[np.int32]:
        """`encode` as an int32 array (N,)."""
        import numpy as np

        ids = self._codec.encode_to_numpy(text)
        ends = self.with_ends([], bos=bos), self.with_ends([], eos=eos)
        return np.concatenate([ends[0], ids, ends[1]]).astype(np.int32) if bos or eos else ids

    def encode_many_to_numpy(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """`encode` of each text: all ids end to end, int32 (N,), and how many of them each text has, (len(texts),).

        For short texts by the thousand, where the call and the list cost as much as the tokens.
        """
        joined = self.encode_joined(texts)
        return joined.without_separators(), joined.lengths

    def encode_joined(self, texts: Sequence[str]) -> JoinedIds:
        """`encode_many_to_numpy` with what stands between texts still there, for `encode_batch` and `count_batch`."""
        import numpy as np

        from llama31_tokenizer.joined_ids import JoinedIds
        from llama31_tokenizer.threads import check_texts

        check_texts(texts)
        if isinstance(self._codec, BpeCodec) and (found := self._codec.encode_joined(texts)):
            return found
        arrays = [self.encode_to_numpy(text) for text in texts]
        ids = np.concatenate([*arrays, np.zeros(0, np.int32)])
        return JoinedIds.end_to_end(ids, np.array([len(one) for one in arrays], np.int64))

    def count(self, text: str) -> int:
        """Number of tokens of a plain text, without making a list of them."""
        return self._codec.encode_to_numpy(text).size

    def count_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[int]:
        """`count` of each text, in threads."""
        from llama31_tokenizer.threads import count_texts

        return count_texts(self, texts, num_threads)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        padding: Padding = False,
        truncation: Truncation = False,
        max_length: int | None = None,
        padding_side: Side = "right",
        truncation_side: Side = "right",
        return_tensors: TensorType | None = None,
        allowed_special: SpecialSet = _NONE,
        num_threads: int | None = None,
    ) -> BatchEncoding:
        """As transformers' tokenizers are called.

        Args:
            text: one text or several.
            add_special_tokens: put bos and eos around as the vocabulary's file says.
            add_bos_token, add_eos_token: overrule it; None leaves it.
            padding: True or "longest", "max_length", or False.
            truncation: True cuts texts to `max_length` tokens, bos and eos included.
            max_length: needed for truncation and for padding="max_length".
            padding_side, truncation_side: "left" or "right".
            return_tensors: "np" or "ms" (MindSpore) for int32 tensors; None for lists.
            allowed_special: as in `encode`; "all" reads control tokens in the text as transformers does.
            num_threads: as in `encode_batch`.

        Raises:
            TokenizerError: an unknown option, or texts that make no tensor.
        """
        from llama31_tokenizer.call import encode_call

        controls = self.vocabulary.controls
        return encode_call(
            self,
            text,
            add_bos=add_special_tokens and (controls.add_bos if add_bos_token is None else add_bos_token),
            add_eos=add_special_tokens and (controls.add_eos if add_eos_token is None else add_eos_token),
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            padding_side=padding_side,
            truncation_side=truncation_side,
            return_tensors=return_tensors,
            allowed_special=allowed_special,
            num_threads=num_threads,
        )

    def encode_with_offsets(self, text: str) -> OffsetEncoding:
        """Ids of a plain text with their byte and character places in it.

        Raises:
            TokenizerError: a text that cannot be encoded as it stands (see `errors`).
        """
        return self._codec.encode_with_offsets(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """Text of the ids.

        Args:
            ids: integers below `vocab_size`.
            skip_special_tokens: leave control tokens out.
            errors: for bytes that are not UTF-8, as in `bytes.decode`.

        Raises:
            TokenizerError: an id that no token has; the message gives its place.
            UnicodeDecodeError: with `errors="strict"`, bytes that are not UTF-8.
        """
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode("utf-8", errors)

    def decode_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool = False, continuing: bool = False) -> bytes:
        """Bytes of the ids, which need not end at a character's end.

        Args:
            ids: as in `decode`.
            skip_special_tokens: as in `decode`.
            continuing: the ids follow others, so a SentencePiece model keeps a space in front.
        """
        if skip_special_tokens:
            special = self._special_ids
            ids = [token for token in ids if token not in special]
        return self._codec.decode_bytes(ids, continuing=continuing)

    def _required(self, token_id: int | None, role: str) -> int:
        if token_id is None:
            raise TokenizerError(f"{self.vocabulary.source}: states no {role} token, so {role}=True cannot be done")
        return token_id
