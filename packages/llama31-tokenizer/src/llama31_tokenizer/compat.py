"""Ways of other Llama 3 tokenizers that differ from the published one, by name and off by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from llama31_tokenizer import llama3
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.vocabulary import Vocabulary

Compat = Literal["mindformers", "meta"]


def make_compatible(vocabulary: Vocabulary, compat: Compat | None) -> Vocabulary:
    """The vocabulary with another tokenizer's ways.

    Raises:
        TokenizerError: an unknown name, or a vocabulary that is not Llama 3's.
    """
    if compat is None:
        return vocabulary
    if compat not in get_args(Compat):
        raise TokenizerError(f"compat is {compat!r}, allowed are {', '.join(get_args(Compat))} and None")
    pad_id = vocabulary.special_tokens.get(llama3.MINDFORMERS_PAD)
    if pad_id is None:
        raise TokenizerError(f"{vocabulary.source}: compat={compat!r} is for Llama 3 vocabularies; leave it out")
    if compat == "meta":
        return replace(vocabulary, cuts_long_texts=True)
    controls = replace(vocabulary.controls, pad_id=pad_id, add_bos=False)
    return replace(vocabulary, normalization="NFC", controls=controls)
