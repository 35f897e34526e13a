"""SentencePiece models (Llama 2 and its relatives), read and run by the sentencepiece library.

Decoding follows the library's: `▁` is a space, the space a dummy prefix added in front of a text is dropped again.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama31_tokenizer.bpe import replace_surrogates
from llama31_tokenizer.controls import build_controls
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llama31_tokenizer.offsets import OffsetEncoding

_UNKNOWN_SURFACE = " \u2047 "  # what SentencePiece's decoder writes for its unknown piece


def parse_sentencepiece(data: bytes, source: Path, sha256: str, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a serialized model.

    Args:
        data: the .model file.
        source: its path.
        sha256: of `data`.
        config: tokenizer_config.json beside it, with tokens added behind the model's and flags for bos and eos.

    Raises:
        TokenizerError: the library is missing, or cannot read the model.
    """
    processor = _load(data, source)
    size = processor.get_piece_size()
    pieces = {processor.id_to_piece(number): number for number in range(size)}
    special = {piece: number for piece, number in pieces.items() if processor.is_control(number)}
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and str(key).isdigit() and int(key) >= size:
            special[str(token.get("content"))] = int(key)

    def role(name: str, stated: int) -> int | None:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        known = {**pieces, **special}.get(token) if isinstance(token, str) else None
        return known if known is not None else (stated if stated >= 0 else None)

    return Vocabulary(
        kind="sentencepiece",
        source=source,
        sha256=sha256,
        size=max([size - 1, *special.values()]) + 1,
        ranks={},
        special_tokens=special,
        controls=build_controls(
            special,
            bos_id=role("bos", processor.bos_id()),
            eos_id=role("eos", processor.eos_id()),
            pad_id=role("pad", processor.pad_id()),
            unk_id=role("unk", processor.unk_id()),
            add_bos=bool(config.get("add_bos_token", True)),
            add_eos=bool(config.get("add_eos_token", False)),
        ),
        pattern=None,
        sentencepiece_model=data,
    )


def _load(data: bytes, source: Path) -> Any:
    try:
        library = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise TokenizerError(
            f"{source}: a SentencePiece model, which needs the sentencepiece library; "
            "pip install 'llama31-tokenizer[sentencepiece]'"
        ) from error
    processor = library.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise TokenizerError(
            f"{source}: looks like a SentencePiece model and is not one the library can read ({error}); fetch it again"
        ) from error
    return processor


class SentencePieceCodec:
    """Encodes and decodes with one SentencePiece model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.sentencepiece_model is not None
        self._processor = _load(vocabulary.sentencepiece_model, vocabulary.source)
        self._size = vocabulary.size
        self._special = {token_id: name for name, token_id in vocabulary.special_tokens.items()}
        self._bytes = [self._bytes_of(number) for number in range(self._processor.get_piece_size())]
        self._drops_prefix = self._has_dummy_prefix()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; what looks like a control token is text."""
        ids: list[int] = self._processor.encode(replace_surrogates(text), return_type=int)
        return ids

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text as an array."""
        ids: npt.NDArray[np.int32] = self._processor.encode(replace_surrogates(text), return_type="numpy")
        return ids.copy()

    def encode_with_offsets(self, text: str) -> OffsetEncoding:
        """Ids with their places in the text, as the library tells them."""
        import numpy as np

        from llama31_tokenizer.offsets import OffsetEncoding

        if replace_surrogates(text) != text:
            raise TokenizerError("text has a lone surrogate; replace it before asking for offsets")
        found = self._processor.encode(text, return_type="offset_mapping", return_bytes=False)
        in_bytes = self._processor.encode(text, return_type="offset_mapping", return_bytes=True)
        ids: list[int] = found["ids"]
        chars = np.array(found["offsets"], np.int64).reshape(-1, 2)
        spans = np.array(in_bytes["offsets"], np.int64).reshape(-1, 2)
        for index, token_id in enumerate(ids):
            # The library gives all bytes of a character to the last of its byte tokens.
            start, end = spans[index].tolist()
            if self._processor.is_byte(token_id) and end - start > 1:
                first = index + 1 - (end - start)
                spans[first : index + 1] = [(at, at + 1) for at in range(start, end)]
                chars[first : index + 1] = chars[index]
        return OffsetEncoding(ids, spans, chars)

    def decode_bytes(self, ids: Sequence[int], *, continuing: bool = False) -> bytes:
        """Bytes of the tokens.

        Args:
            ids: tokens, control tokens as their names.
            continuing: text stood before, so a leading space is one.

        Raises:
            TokenizerError: an id that no token has.
        """
        out: list[bytes] = []
        at_start = not continuing and self._drops_prefix
        for index, token_id in enumerate(ids):
            if token_id in self._special:
                out.append(self._special[token_id].encode())
                continue
            if not 0 <= token_id < len(self._bytes):
                raise TokenizerError(
                    f"ids[{index}] is {token_id}, no token has that id; allowed are 0 to {self._size - 1}"
                )
            token = self._bytes[token_id]
            out.append(token.removeprefix(b" ") if at_start else token)
            at_start = False
        return b"".join(out)

    def _bytes_of(self, number: int) -> bytes:
        piece: str = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        if self._processor.is_unknown(number):
            return _UNKNOWN_SURFACE.encode()
        return piece.replace("\u2581", " ").encode()

    def _has_dummy_prefix(self) -> bool:
        for number in range(self._processor.get_piece_size()):
            if self._processor.id_to_piece(number).startswith("\u2581") and len(self._bytes[number]) > 1:
                return not self._processor.decode([number]).startswith(" ")
        return False
