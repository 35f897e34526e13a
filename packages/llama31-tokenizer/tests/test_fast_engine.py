"""The optional engine: ids of the default one over every code point, made-up text, long runs and other vocabularies."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import Tokenizer, TokenizerError

STEP = 4096


@pytest.fixture(scope="module")
def fast(llama3_file: Path) -> Tokenizer:
    return Tokenizer.from_file(llama3_file, engine="fastokens")


def test_every_call(llama3: Tokenizer, fast: Tokenizer) -> None:
    text = (
        "It's 1,234 \u2014 \u6607\u817e\u5904\u7406\u5668\u7684\u6a21\u578b <|eot_id|>\r\n\n  e\u0301 "
        "\U0001f469\u200d\U0001f469 \u0627\u0644\u0646\u062a\u0627\u0626\u062c"
        + "".join(map(chr, range(0xE0000, 0xE0080)))
    )
    assert fast.encode(text) == llama3.encode(text)
    assert fast.encode(text, bos=True, allowed_special="all") == llama3.encode(text, bos=True, allowed_special="all")
    assert fast.encode_to_numpy(text).tolist() == llama3.encode(text)
    assert fast.count(text) == llama3.count(text)
    assert fast.encode_with_offsets(text).char_spans.tolist() == llama3.encode_with_offsets(text).char_spans.tolist()


def test_every_character(llama3: Tokenizer, fast: Tokenizer) -> None:
    for first in range(0, 0x110000, STEP):
        chars = [chr(code) for code in range(first, first + STEP) if not 0xD800 <= code < 0xE000]
        for between in ("a ", "1", " "):
            text = between.join(chars)
            assert fast.encode(text) == llama3.encode(text), f"U+{first:04X} to U+{first + STEP - 1:04X}"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(), st.sampled_from(["  ", "\r\n", "'Re", "\u3000", "<|eot_id|>", "\ud800", "123"]))))
def test_made_up_text(llama3: Tokenizer, fast: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert fast.encode(text) == llama3.encode(text)
    many, lengths = fast.encode_many_to_numpy(parts)
    assert many.tolist() == [token for part in parts for token in llama3.encode(part)]
    assert lengths.tolist() == [len(llama3.encode(part)) for part in parts]


@pytest.mark.parametrize("unit", ["a", " ", "\n", "😀", "\x00", "中"])
def test_long_runs(unit: str, llama3: Tokenizer, fast: Tokenizer) -> None:
    text = f"before {unit * 300_000} after"
    assert fast.encode(text) == llama3.encode(text)


def test_random_bytes_and_batches(llama3: Tokenizer, fast: Tokenizer) -> None:
    source = random.Random(0)
    texts = [source.randbytes(source.randrange(400)).decode("utf-8", "replace") for _ in range(500)]
    assert fast.encode_batch(texts, num_threads=2) == llama3.encode_batch(texts)


def test_another_pattern_normalised_and_pickled(llama3: Tokenizer, tmp_path: Path, llama3_file: Path) -> None:
    mindformers = Tokenizer.from_file(llama3_file, compat="mindformers", engine="fastokens")
    text = "e\u0301 <|eot_id|>"
    assert mindformers.encode(text) == llama3.encode("\u00e9 <|eot_id|>")
    copy = pickle.loads(pickle.dumps(mindformers))
    assert copy.engine == "fastokens"
    assert copy.encode(text) == mindformers.encode(text)


def test_errors(llama3_file: Path, smollm2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match="engine is 'fast', allowed are tiktoken, fastokens"):
        Tokenizer.from_file(llama3_file, engine="fast")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"fastokens cannot run this vocabulary .*; leave engine out"):
        Tokenizer.from_file(smollm2_file, engine="fastokens")
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with pytest.raises(TokenizerError, match=r"pip install 'llama31-tokenizer\[fast\]'"):
        Tokenizer.from_file(llama3_file, engine="fastokens")
