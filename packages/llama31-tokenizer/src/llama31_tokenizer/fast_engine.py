"""The optional engine: a byte-level BPE vocabulary run by fastokens, four times as fast as tiktoken and with its ids.

fastokens (Apache-2.0, no dependencies) keeps the tokens of pieces it has seen. It wants a merge list, which is worked
out from the ranks here and takes it seconds to load where tiktoken takes a tenth of one: so it is for bulk work and is
chosen by name. Control tokens, normalisation, long runs and missing bytes stay with the codec around it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.vocabulary import ControlTokens, Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llama31_tokenizer.joined_ids import JoinedIds

Engine = Literal["tiktoken", "fastokens"]


def check_engine(engine: str, vocabulary: Vocabulary) -> None:
    """Raise TokenizerError for an engine that is unknown or cannot run the vocabulary."""
    if engine not in get_args(Engine):
        raise TokenizerError(f"engine is {engine!r}, allowed are {', '.join(get_args(Engine))}")
    if engine == "fastokens" and vocabulary.sentencepiece_model is not None:
        raise TokenizerError(
            f"{vocabulary.source}: a SentencePiece model, engine='fastokens' runs byte-level BPE; leave engine out"
        )


class FastEngine:
    """Encodes text in which nothing is special.

    Args:
        vocabulary: with ranks and a pattern.

    Raises:
        TokenizerError: fastokens is not installed, or does not take the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llama31_tokenizer.save import build_hf_json

        bare = replace(
            vocabulary,
            special_tokens={},
            literal_tokens={},
            controls=ControlTokens(),
            normalization=None,
            unknown_byte_id=None,
        )
        library = _import_fastokens()
        try:
            self._native = library.Tokenizer.from_json_str(json.dumps(build_hf_json(bare), ensure_ascii=False))
        except ValueError as error:
            raise TokenizerError(
                f"{vocabulary.source}: fastokens cannot run this vocabulary ({error}); leave engine out"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.encode_to_numpy(text).tolist()
        return ids

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, int32 (N,)."""
        return self.encode_joined([text]).ids

    def encode_joined(self, texts: Sequence[str]) -> JoinedIds:
        """Ids of texts end to end."""
        import numpy as np

        from llama31_tokenizer.bpe import replace_surrogates
        from llama31_tokenizer.joined_ids import JoinedIds

        try:
            ids, ends = self._native.encode_batch_flat(list(texts))
        except UnicodeEncodeError:
            ids, ends = self._native.encode_batch_flat([replace_surrogates(text) for text in texts])
        return JoinedIds.end_to_end(np.frombuffer(ids, np.int32).copy(), np.diff(np.frombuffer(ends, np.int64)))


def _import_fastokens() -> Any:
    try:
        return importlib.import_module("fastokens")
    except ImportError as error:
        raise TokenizerError(
            "engine='fastokens' needs the fastokens library; pip install 'llama31-tokenizer[fast]', or leave engine out"
        ) from error
