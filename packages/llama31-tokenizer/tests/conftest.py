"""The real vocabularies, loaded once a session, and references made from them by other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama31_tokenizer import Tokenizer
from model_assets import fetch


@pytest.fixture(scope="session")
def llama3_file() -> Path:
    return fetch("llama3-tokenizer")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return fetch("smollm2-gguf")


@pytest.fixture(scope="session")
def llama3(llama3_file: Path) -> Tokenizer:
    return Tokenizer.from_file(llama3_file)


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Tokenizer:
    return Tokenizer.from_file(smollm2_file)


@pytest.fixture(scope="session")
def meta_tokenizer(llama3_file: Path) -> Any:
    """Meta's own tokenizer over the same file."""
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer(llama3_file)


@pytest.fixture(scope="session")
def hf_llama3(llama3_file: Path) -> Any:
    """Hugging Face's tokenizer, made from the same ranks by transformers' own converter."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from llama31_tokenizer.llama3 import SPECIAL_TOKENS
    from llama31_tokenizer.patterns import LLAMA3

    return TikTokenConverter(
        str(llama3_file), pattern=LLAMA3.split, extra_special_tokens=list(SPECIAL_TOKENS)
    ).converted()


@pytest.fixture(scope="session")
def hf_smollm2(smollm2_file: Path) -> Any:
    """Hugging Face's tokenizer, made by transformers from the merges of the GGUF file."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(smollm2_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    return tokenizer
