"""Very long runs: the same ids as without any splitting, no panic, and windows joined exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import Tokenizer
from llama31_tokenizer.bpe import BpeCodec
from llama31_tokenizer.long_pieces import encode_long_piece
from llama31_tokenizer.long_runs import encode_around_runs, find_long_run


def codec_of(tokenizer: Tokenizer) -> BpeCodec:
    assert isinstance(tokenizer._codec, BpeCodec)
    return tokenizer._codec


FIXTURES_ONCE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES_ONCE)
@given(data=st.data(), window=st.integers(8, 64))
def test_joined_windows_equal_one_piece(data: st.DataObject, window: int, llama3: Tokenizer) -> None:
    alphabet = data.draw(
        st.sampled_from([b"a", b"ab", b" ", b"\t\n ", "中文的".encode(), bytes(range(256)), b"0123=-_/"])
    )
    piece = bytes(data.draw(st.lists(st.sampled_from(list(alphabet)), min_size=1, max_size=400)))
    encoding = codec_of(llama3)._encoding
    joined = encode_long_piece(piece, encoding._encode_single_piece, encoding.decode_single_token_bytes, window)
    assert joined == encoding._encode_single_piece(piece)


RUNS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(list(" \n\t\u3000aé中1!\u0301'ſ😀\u0378")), st.integers(1, 40)).map(
            lambda run: run[0] * run[1]
        ),
        st.sampled_from([" ", "\r\n", "'s", "x", "12", " !", "\n", "\u0558", "a b c d e f g h"]),
    ),
    max_size=30,
).map("".join)


@settings(max_examples=600, deadline=None, suppress_health_check=FIXTURES_ONCE)
@given(text=RUNS, step=st.integers(4, 16))
def test_text_around_runs_equals_whole(text: str, step: int, llama3: Tokenizer, smollm2: Tokenizer) -> None:
    for tokenizer in (llama3, smollm2):
        codec = codec_of(tokenizer)
        ordinary = codec._encoding.encode_ordinary
        assert encode_around_runs(text, codec._pattern, ordinary, codec._encode_piece, step) == ordinary(text)


def test_runs_of_twice_the_step_are_found() -> None:
    for start in range(20):
        text = "a1" * (start // 2) + "b" * (start % 2) + "!" * 19 + "z1z1"
        inside = find_long_run(text, 0, 10)
        assert inside is not None
        assert inside[1] == start // 2 * 2 + start % 2 + 19


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_200_000 + "x",
        "word " + "\n" * 300_000 + " " * 1_100_000 + "\t12",
        "😀" * 200_000 + " tail",
        "".join(random.Random(0).choices("abcdefghij", k=400_000)) + " 12",
        "中" * 200_000 + "。" + "\u3000" * 150_000,
    ],
    ids=["spaces", "newlines and spaces", "emoji", "letters", "chinese"],
)
def test_long_runs_equal_hugging_face(text: str, llama3: Tokenizer, hf_llama3: Any) -> None:
    hf_llama3.encode_special_tokens = True
    ids = llama3.encode(text)
    assert ids == hf_llama3.encode(text, add_special_tokens=False).ids
    assert llama3.decode(ids) == text


def test_long_texts_without_runs_are_encoded_with_the_others(llama3: Tokenizer, hf_llama3: Any) -> None:
    texts = ["short", "Some words, and 12 numbers.\n" * 10_000, ""]
    found = codec_of(llama3).encode_joined(texts)
    assert found is not None
    rows = [encoding.ids for encoding in hf_llama3.encode_batch(texts, add_special_tokens=False)]
    assert found.to_lists(llama3.vocab_size) == rows
    assert codec_of(llama3).encode_joined([*texts, " " * 200_000]) is None
    assert llama3.encode_batch([*texts, " " * 200_000])[:-1] == rows


def test_million_random_characters(llama3: Tokenizer) -> None:
    rng = random.Random(7)
    text = rng.randbytes(2_000_000).decode("utf-8", "replace") + " " * 1_500_000
    assert llama3.decode(llama3.encode(text)) == text


def test_lone_surrogates_count_as_replacement_characters(llama3: Tokenizer) -> None:
    assert llama3.encode("a\ud800b") == llama3.encode("a\ufffdb")
    assert llama3.encode("\ud83d\ude00") == llama3.encode("😀")
    assert llama3.encode("\udc00" + " " * 200_000) == llama3.encode("\ufffd" + " " * 200_000)
    letters = "a\ud835\udc00" * 70_000  # a run of letters, of which half are written in two parts
    assert codec_of(llama3).encode_joined([letters]) is None
    assert llama3.encode(letters) == llama3.encode("a\U0001d400" * 70_000)
    assert llama3.encode("a\ud800b" * 50_000) == llama3.encode("a\ufffdb" * 50_000)
