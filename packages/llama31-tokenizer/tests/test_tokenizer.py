"""Control tokens in texts, decoding, streams, offsets, batches and the transformers-like call."""

from __future__ import annotations

import itertools
import pickle
import random
import sys
import types
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import StreamDecoder, Tokenizer, TokenizerError
from llama31_tokenizer.batch import pad_batch
from llama31_tokenizer.bpe import BpeCodec

FIXTURES_ONCE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
TEXT = "Hello, wörld! 你好 😀👩‍👩‍👧 'tis <|eot_id|>\n\n  end\t"
IDS = st.lists(st.integers(0, 128_255) | st.sampled_from([222, 240, 128_000, 128_009, 9_468]), max_size=30)
SEPARATORS = ("<|reserved_special_token_245|>", "<empty_output>")  # what stands between texts, of Llama 3 and SmolLM2


def test_control_tokens_are_text_unless_allowed(llama3: Tokenizer) -> None:
    text = "a<|eot_id|>b<|python_tag|>c"
    special = set(llama3.special_tokens.values())
    assert not special & set(llama3.encode(text))
    one = llama3.encode(text, allowed_special={"<|eot_id|>"})
    assert special & set(one) == {128_009}
    assert special & set(llama3.encode(text, allowed_special="all")) == {128_009, 128_010}
    assert llama3.decode(one) == text
    with pytest.raises(TokenizerError, match=r"'<\|eot_id\|>' at character 1"):
        llama3.encode(text, disallowed_special="all")
    with pytest.raises(TokenizerError, match=r"'<\|python_tag\|>' at character 12"):
        llama3.encode(text, allowed_special={"<|eot_id|>"}, disallowed_special="all")
    assert llama3.encode(text, disallowed_special={"<|eom_id|>"}) == llama3.encode(text)
    for sets in ({"allowed_special": {"<|nope|>"}}, {"disallowed_special": "<|eot_id|>"}):
        with pytest.raises(TokenizerError, match="expected 'all' or a set of names"):
            llama3.encode(text, **sets)


def test_longer_names_win(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<repo_name><reponame>", allowed_special="all")
    assert ids == [smollm2.special_tokens["<repo_name>"], smollm2.special_tokens["<reponame>"]]


def test_wrong_types_raise(llama3: Tokenizer) -> None:
    for wrong in (None, b"bytes", 3):
        with pytest.raises(TypeError):
            llama3.encode(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[128_256], [-1], [1, 2, 2**40], [49_152]])
def test_ids_out_of_range(ids: list[int], llama3: Tokenizer, smollm2: Tokenizer) -> None:
    tokenizer = smollm2 if ids == [49_152] else llama3
    with pytest.raises(
        TokenizerError, match=rf"ids\[{len(ids) - 1}\] is {ids[-1]}, .* 0 to {tokenizer.vocab_size - 1}"
    ):
        tokenizer.decode(ids)


def test_decode_options(llama3: Tokenizer) -> None:
    ids = llama3.encode("😀", bos=True)
    assert llama3.decode(ids, skip_special_tokens=True) == "😀"
    half = ids[1:2]
    assert llama3.decode(half) == "\ufffd"
    assert llama3.decode(half, errors="ignore") == ""
    assert llama3.decode_bytes(half) == "😀".encode()[: len(llama3.decode_bytes(half))]
    with pytest.raises(UnicodeDecodeError):
        llama3.decode(half, errors="strict")


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES_ONCE)
@given(ids=IDS, skip=st.booleans(), cuts=st.lists(st.integers(0, 30)))
def test_stream_equals_whole(ids: list[int], skip: bool, cuts: list[int], llama3: Tokenizer) -> None:
    stream = StreamDecoder(llama3, skip_special_tokens=skip)
    for _ in range(2):  # a flushed decoder can be used again
        edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
        pieces = [stream.push(ids[start:end]) for start, end in itertools.pairwise(edges)]
        assert "".join([*pieces, stream.flush()]) == llama3.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURES_ONCE)
@given(text=st.text(max_size=60))
def test_stream_never_shows_half_a_character(text: str, llama3: Tokenizer, smollm2: Tokenizer) -> None:
    ids = llama3.encode(text)
    stream = StreamDecoder(llama3)
    shown = ""
    for token in ids:
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES_ONCE)
@given(text=st.text(max_size=60) | st.sampled_from([TEXT, "", " ", "\x04", "a\x04!\x13!"]))
def test_offsets(text: str, llama3: Tokenizer, smollm2: Tokenizer, hf_llama3: Any) -> None:
    found = llama3.encode_with_offsets(text)
    assert found.ids == llama3.encode(text)
    data = text.encode()
    for token, (start, end) in zip(found.ids, found.byte_spans.tolist(), strict=True):
        assert llama3.decode_bytes([token]) == data[start:end]
    hf_llama3.encode_special_tokens = True
    assert [tuple(span) for span in found.char_spans.tolist()] == hf_llama3.encode(
        text, add_special_tokens=False
    ).offsets
    small = smollm2.encode_with_offsets(text)
    missing = bytes(byte for byte in data if bytes([byte]) not in smollm2.vocabulary.ranks)
    for token, (start, end) in zip(small.ids, small.byte_spans.tolist(), strict=True):
        assert smollm2.decode_bytes([token]) == data[start:end].translate(None, missing)


def test_offsets_need_the_text_as_it_is_encoded(llama3: Tokenizer, llama3_file: Any) -> None:
    with pytest.raises(TokenizerError, match="surrogate at character 1"):
        llama3.encode_with_offsets("a\ud800")
    with pytest.raises(TokenizerError, match="not in NFC"):
        Tokenizer.from_file(llama3_file, compat="mindformers").encode_with_offsets("e\u0301")


@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_threads_share_short_and_long_texts(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    texts = [f"line {n} of <|eot_id|> 日本語\n" * (1 + 500 * (n % 400 == 7)) for n in range(12_000)]
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, num_threads=3) == expected
    assert tokenizer.count_batch(texts, num_threads=3) == [len(ids) for ids in expected]


def test_an_error_in_a_thread_is_the_batch_s(llama3: Tokenizer) -> None:
    texts = ["plain text " * 20_000] * 4 + ["<|eot_id|>"] + ["plain text " * 20_000] * 4
    with pytest.raises(TokenizerError, match="eot_id"):
        llama3.encode_batch(texts, disallowed_special="all", num_threads=3)


@pytest.mark.parametrize("num_threads", [1, 2, None])
def test_batch_equals_one_by_one(num_threads: int | None, llama3: Tokenizer) -> None:
    rng = random.Random(1)
    texts = [TEXT * rng.randrange(400) for _ in range(60)] + ["", "a\ud800"]
    expected = [llama3.encode(text, bos=True, eos=True) for text in texts]
    assert llama3.encode_batch(texts, bos=True, eos=True, num_threads=num_threads) == expected
    assert llama3.count_batch(texts, num_threads=num_threads) == [len(ids) - 2 for ids in expected]
    for text, ids in zip(texts, expected, strict=True):
        array = llama3.encode_to_numpy(text, bos=True, eos=True)
        assert array.dtype == np.int32
        assert array.tolist() == ids
        assert llama3.encode_to_numpy(text).tolist() == ids[1:-1]
        assert llama3.count(text) == len(ids) - 2


@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURES_ONCE)
@given(
    texts=st.lists(
        st.text(max_size=30) | st.sampled_from(["", TEXT, *(f"x{name}" for name in SEPARATORS), "<|reserved", "\ud800"])
    )
)
@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_many_texts_in_one_call_are_each_encoded_alone(
    name: str, texts: list[str], request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids, lengths = tokenizer.encode_many_to_numpy(texts)
    assert ids.dtype == np.int32
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
    assert [part.tolist() for part in parts] == [tokenizer.encode(text) for text in texts]


def test_control_tokens_names_in_texts_part_nothing(llama3: Tokenizer, smollm2: Tokenizer) -> None:
    for tokenizer, name in zip((llama3, smollm2), SEPARATORS, strict=True):
        assert isinstance(tokenizer._codec, BpeCodec)
        assert tokenizer._codec._separator == (name, tokenizer.special_tokens[name])
    codec = llama3._codec
    assert isinstance(codec, BpeCodec)
    names = [f"about {name}" for name in llama3.special_tokens]
    for texts in (names[:11], names[-1:], names[-2:]):
        joined = codec.encode_joined(texts)
        assert joined is None or joined.to_lists(llama3.vocab_size) == [llama3.encode(text) for text in texts]
    assert codec.encode_joined(names[:11]) is not None  # those that texts about models have


def test_a_long_text_among_many_is_encoded_as_alone(llama3: Tokenizer) -> None:
    texts = ["a", "z" * 300_000, "b c"]
    ids, lengths = llama3.encode_many_to_numpy(texts)
    assert lengths.tolist() == [len(llama3.encode(text)) for text in texts]
    assert ids.tolist() == [token for text in texts for token in llama3.encode(text)]


@pytest.mark.parametrize("names", [("<s>", "<s>x"), ("<s>x", "<s>"), ("<pad>", "<pad>1")])
def test_a_control_token_that_begins_another_parts_no_texts(names: tuple[str, str], llama3: Tokenizer) -> None:
    ids = {name: llama3.vocab_size + at for at, name in enumerate(names)}
    size = llama3.vocab_size + len(names)
    tokenizer = Tokenizer(replace(llama3.vocabulary, special_tokens=ids, size=size))
    long, short = sorted(names, key=len, reverse=True)
    texts = ["a", long.removeprefix(short) + short + "b"]
    assert tokenizer.encode_batch(texts, num_threads=1) == [llama3.encode(text) for text in texts]


def test_batch_arguments(llama3: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="texts is one string"):
        llama3.encode_batch("hello")
    with pytest.raises(TokenizerError, match="texts is one string"):
        llama3.encode_many_to_numpy("hello")
    with pytest.raises(TokenizerError, match=r"texts\[1\] is NoneType, expected a string"):
        llama3.count_batch(["a", None])  # type: ignore[list-item]
    wrong: list[Any] = [iter(["a"]), {"a"}, {"a": 1}]
    for many in wrong:
        for call in (llama3.encode_batch, llama3.count_batch, llama3.encode_many_to_numpy):
            with pytest.raises(TokenizerError, match=f"texts is {type(many).__name__}, expected a list of strings"):
                call(many)
    with pytest.raises(TokenizerError, match="num_threads is 0"):
        llama3.encode_batch(["hello"], num_threads=0)
    with pytest.raises(TokenizerError, match=r"num_threads is 2\.5, expected a whole number"):
        llama3.encode_batch(["hello"], num_threads=2.5)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="disallowed_special"):
        llama3.encode_batch(["ok", "<|eot_id|>"], disallowed_special="all")
    assert llama3.encode_batch([]) == []


def test_pad_batch() -> None:
    right = pad_batch([[1, 2, 3], [], [4]], pad_id=9)
    assert right.input_ids.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert right.attention_mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    left = pad_batch([[1, 2, 3], [4]], pad_id=9, side="left", length=2, truncation_side="left")
    assert left.input_ids.tolist() == [[2, 3], [9, 4]]
    assert left.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert left.num_truncated == 1
    assert pad_batch([[1, 2]], pad_id=None).input_ids.tolist() == [[1, 2]]
    with pytest.raises(TokenizerError, match="no pad token"):
        pad_batch([[1, 2], [1]], pad_id=None)
    with pytest.raises(TokenizerError, match="row 0 has 3 tokens, more than length 2"):
        pad_batch([[1, 2, 3]], pad_id=0, length=2)
    with pytest.raises(TokenizerError, match="side is 'up'"):
        pad_batch([[1]], pad_id=0, side="up")  # type: ignore[arg-type]


CALLS: list[dict[str, Any]] = [
    {},
    {"add_special_tokens": False},
    {"padding": True, "return_tensors": "np"},
    {"padding": "max_length", "max_length": 12},
    {"padding": "max_length", "max_length": 8, "truncation": True},
    {"truncation": True, "max_length": 4},
    {"padding": "longest", "truncation": True, "max_length": 5, "padding_side": "left", "return_tensors": "np"},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_call_equals_transformers(options: dict[str, Any], llama3: Tokenizer, tmp_path_factory: Any) -> None:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.getbasetemp() / "llama3-saved"
    if not directory.exists():
        llama3.save_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    for texts in ("One text.", ["One text.", "A somewhat longer one, é!", ""]):
        if options.get("return_tensors") and isinstance(texts, str):
            texts = [texts]
        ours = llama3(texts, **options)
        reference = theirs(texts, **options)
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_equal(ours[name], reference[name])
        assert ours.input_ids is ours["input_ids"]


def test_call_options(llama3: Tokenizer) -> None:
    assert llama3("a", add_bos_token=False, add_eos_token=True).input_ids == [64, 128_001]
    assert llama3("<|eot_id|>", add_bos_token=False, allowed_special="all").input_ids == [128_009]
    cut = llama3(["a b c d", "a"], truncation=True, max_length=3, truncation_side="left")
    assert cut.input_ids == [[128_000, 272, 294], [128_000, 64]]
    assert cut.num_truncated == 1
    for options, message in (
        ({"padding": "up"}, "padding is 'up'"),
        ({"truncation": True}, "need max_length"),
        ({"return_tensors": "pt"}, "return_tensors is 'pt', allowed are None, 'np', 'ms'"),
        ({"truncation": True, "max_length": 0}, "too short"),
    ):
        with pytest.raises(TokenizerError, match=message):
            llama3("a b", **options)
    with pytest.raises(TokenizerError, match="padding=True"):
        llama3(["a b", "a"], return_tensors="np")
    with pytest.raises(AttributeError):
        _ = cut.labels


def test_mindspore_tensors(llama3: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mindspore")
    module.Tensor = lambda array: ("tensor", array.dtype, array.tolist())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mindspore", module)
    found = llama3(["a", "a b"], return_tensors="ms", padding=True)
    assert found.input_ids == ("tensor", np.int32, [[128_000, 64, 128_004], [128_000, 64, 293]])
    assert found.attention_mask[2] == [[1, 1, 0], [1, 1, 1]]


def test_processes_can_be_handed_one(smollm2: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(smollm2))
    assert again.encode(TEXT) == smollm2.encode(TEXT)
    assert again.special_tokens == smollm2.special_tokens


def test_compat_mindformers(llama3: Tokenizer, llama3_file: Any) -> None:
    theirs = Tokenizer.from_file(llama3_file, compat="mindformers")
    text = "e\u0301 \u212b"
    assert theirs.encode(text) == llama3.encode(unicodedata.normalize("NFC", text)) != llama3.encode(text)
    assert (theirs.pad_id, llama3.pad_id) == (128_002, 128_004)
    assert theirs("a").input_ids == [64]


def test_compat_meta_cuts_as_meta_does(llama3: Tokenizer, llama3_file: Any, meta_tokenizer: Any) -> None:
    ours = Tokenizer.from_file(llama3_file, compat="meta")
    rng = random.Random(3)
    for text in (
        "a" * 25_001 + " b" + " " * 60_000 + "x",
        "".join(rng.choices("abc  \n", k=900_001)),
        "中" * 49_999 + "\x1c" * 30_000,
        " " * 25_000,
    ):
        assert ours.encode(text) == meta_tokenizer.encode(text, bos=False, eos=False)
    assert llama3.encode("abcdefg" * 4_000) != ours.encode("abcdefg" * 4_000)


def test_compat_is_for_llama3(llama3_file: Any, smollm2_file: Any) -> None:
    with pytest.raises(TokenizerError, match="compat is 'x', allowed are mindformers, meta"):
        Tokenizer.from_file(llama3_file, compat="x")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="for Llama 3 vocabularies"):
        Tokenizer.from_file(smollm2_file, compat="meta")
