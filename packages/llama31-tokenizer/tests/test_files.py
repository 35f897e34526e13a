"""Vocabulary files: told apart by content, compared with the libraries they come from, and refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import Tokenizer, TokenizerError
from llama31_tokenizer.gguf_metadata import read_gguf_metadata
from llama31_tokenizer.llama3 import GENUINE_SHA256, SPECIAL_TOKENS
from llama31_tokenizer.patterns import LLAMA3
from llama31_tokenizer.ranks import format_ranks, parse_ranks

CORPUS = [
    "the quick brown fox jumps over the lazy dog 1234 times, didn't it?\n\n  def f(x):\n\treturn x + 1\n"
] * 20 + ["昇腾处理器上的模型 模型 处理器 — naïve café 😀😀 <|x|> isn't 2024 10:30\r\n"] * 20


def test_genuine_file(llama3: Tokenizer, llama3_file: Path) -> None:
    assert llama3.sha256 == GENUINE_SHA256 == hashlib.sha256(llama3_file.read_bytes()).hexdigest()
    assert llama3.vocab_size == 128_256
    assert len(llama3.vocabulary.ranks) == 128_000
    names = ("begin_of_text", "end_of_text", "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id")
    ids = [llama3.special_tokens[f"<|{name}|>"] for name in (*names, "eom_id", "eot_id", "python_tag", "image")]
    assert ids == [128000, 128001, 128004, 128005, 128006, 128007, 128008, 128009, 128010, 128011]
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, 128004)
    assert (llama3.eot_id, llama3.eom_id) == (128009, 128008)
    assert set(llama3.stop_ids) == {128001, 128008, 128009}


def test_special_names_equal_metas(llama3: Tokenizer, meta_tokenizer: Any) -> None:
    assert dict(llama3.special_tokens) == meta_tokenizer.special_tokens
    assert set(llama3.stop_ids) == set(meta_tokenizer.stop_tokens)
    assert llama3.pad_id == meta_tokenizer.pad_id


def test_checked_and_trusted_parsers_agree(llama3: Tokenizer, llama3_file: Path) -> None:
    data = llama3_file.read_bytes()
    assert parse_ranks(data, llama3_file, "not the genuine one") == dict(llama3.vocabulary.ranks)
    assert format_ranks(dict(llama3.vocabulary.ranks)) == data


def test_names_of_files_do_not_matter(llama3_file: Path, smollm2_file: Path, tmp_path: Path) -> None:
    shutil.copy(llama3_file, tmp_path / "vocab.json")
    (tmp_path / "tokenizer.model").symlink_to(smollm2_file)
    assert Tokenizer.from_file(tmp_path / "vocab.json").vocab_size == 128_256
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").vocab_size == 49_152
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 49_152


def change_lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda data: b"\n".join(change(data.splitlines())) + b"\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:500_000], r"tokenizer.model:\d+: |31,?\d+ ranks|ranks, a Llama 3"),
        (change_lines(lambda lines: lines[:-1]), "127,999 ranks, a Llama 3 vocabulary has 128,000"),
        (change_lines(lambda lines: [*lines, b"enp6eg== 128000"]), "128,001 ranks"),
        (change_lines(lambda lines: [*lines[:9], b"!!!! 9", *lines[10:]]), ":10: .*not base64"),
        (change_lines(lambda lines: [*lines[:9], b"only", *lines[10:]]), ":10: got b'only'"),
        (change_lines(lambda lines: [*lines[:9], b"Kg== -9", *lines[10:]]), ":10: got"),
        (change_lines(lambda lines: [*lines[:10], lines[9], *lines[11:]]), ":11: rank 9 is a duplicate, expected 10"),
        (change_lines(lambda lines: [*lines[:9], *lines[10:]]), ":10: rank 10 comes too early, expected 9"),
        (
            change_lines(lambda lines: [*lines[:10], lines[9].split()[0] + b" 10", *lines[11:]]),
            ":11: token .* has rank 9 already",
        ),
        (lambda data: b"", "an empty file"),
        (lambda data: b"<!DOCTYPE html><html>", "HTML page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda data: b"PK\x03\x04rest", "zip archive"),
        (lambda data: struct.pack("<Q", 9) + b'{"a":{}}  ', "safetensors"),
        (lambda data: b"\x00\x01\x02", "first bytes are"),
        (lambda data: b'{"a": 1', r"model:1: column \d+: not JSON"),
        (lambda data: b'{"a": 1}', "no `model` object"),
        (lambda data: b'{"model": {"type": "Unigram", "vocab": [["a", 0]]}}', "model.type is Unigram"),
        (lambda data: b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "model.type is WordPiece"),
        (lambda data: b'{"model": {"type": "BPE", "byte_fallback": true, "vocab": {"a": 0}}}', "tokenizer.model"),
        (lambda data: b'{"a": "\xff"}', "not UTF-8"),
        (lambda data: b"GGUF\x03\x00\x00\x00", "header ends or breaks"),
        (lambda data: b"GGUF\x01\x00\x00\x00" + bytes(16), "GGUF version 1"),
        (lambda data: b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "header ends or breaks"),
    ],
)
def test_damaged_files_are_named(
    damage: Callable[[bytes], bytes], message: str, llama3_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(llama3_file.read_bytes()))
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.from_file(path)
    assert str(path) in str(error.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(TokenizerError, match="not a directory"):
        Tokenizer.from_pretrained(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="no file in it is a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def train(kind: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
    first: dict[str, list[Any]] = {
        "llama3": [pre_tokenizers.Split(Regex(LLAMA3.split or ""), "isolated")],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt2": [],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first[kind], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "llama3" else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<|x|>", "😀😀"])
    return tokenizer


@pytest.fixture(scope="session", params=["llama3", "smollm", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """A small vocabulary that Hugging Face trained, in its hands and in ours."""
    theirs = train(request.param)
    path = tmp_path_factory.mktemp(request.param) / "some.bin"
    theirs.save(str(path))
    return theirs, Tokenizer.from_file(path)


WORDS = st.sampled_from(
    [*" ".join(CORPUS[::20]).split(" "), " ", "\n", "<s>", "</s>", "<|x|>", "é", "e\u0301", "12", "\x00"]
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(text=st.lists(WORDS | st.text(max_size=5), max_size=20).map("".join))
@example(text="\U0003d9a4\x84")  # a letter since Unicode 18, which the regex library knows and tiktoken does not yet
def test_trained_vocabularies_equal_hugging_face(text: str, trained: tuple[Any, Tokenizer]) -> None:
    theirs, ours = trained
    theirs.encode_special_tokens = True
    assert ours.encode(text) == theirs.encode(text).ids
    theirs.encode_special_tokens = False
    assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": None}, "must be ByteLevel"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            },
            r"\[a-z\]\+.*known are llama-bpe, qwen2, gpt-2, smollm",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer.type is Lowercase"),
        ({"decoder": {"type": "WordPiece"}}, "decoder.type is WordPiece"),
        ({"added_tokens": [{"id": 0, "content": "<s>", "lstrip": True}]}, "lstrip is true"),
        ({"added_tokens": [{"content": "<s>"}]}, r"added_tokens\[0\]"),
        ({"added_tokens": [{"id": 0, "content": "<s>"}, {"id": 0, "content": "<t>"}]}, "id 0 belongs to"),
    ],
)
def test_json_that_cannot_be_exact_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = json.loads(train("llama3").to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**root, **change}))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["merges"].reverse(), "out of order"),
        (lambda model: model["merges"].pop(), "has no merge though"),
        (lambda model: model["merges"].append(["zz", "y"]), "merge .* needs"),
        (lambda model: model["merges"].__setitem__(3, "nospace"), r"merges\[3\]"),
        (lambda model: model.update(merges=None), "model.merges is missing"),
        (lambda model: model["vocab"].update({"日本": 5000}), "byte-level alphabet"),
        (lambda model: model["vocab"].update(a=model["vocab"]["b"]), "out of order|two tokens have one id"),
        (lambda model: model["vocab"].update(a=-1), "has id -1"),
        (lambda model: model.update(dropout=0.1), "model.dropout"),
    ],
)
def test_json_models_that_cannot_be_exact_are_refused(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    root = json.loads(train("llama3").to_str())
    change(root["model"])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(root))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(path)


def write_gguf(path: Path, **changes: Any) -> Path:
    """A vocabulary-only GGUF of the trained llama3-like vocabulary, by the gguf library."""
    from gguf import GGUFWriter

    theirs = train("llama3")
    vocab = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    kinds = [3 if name in ("<s>", "</s>") else 4 if name in ("<|x|>", "😀😀") else 1 for name, _ in vocab]
    merges = [" ".join(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    fields: dict[str, Any] = {"model": "gpt2", "pre": "llama-bpe", "eos": 1, **changes}
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields.get("tokens", [name for name, _ in vocab]))
    writer.add_token_types(fields.get("types", kinds))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(fields["eos"])
    writer.add_eot_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_equals_hugging_face(tmp_path: Path) -> None:
    theirs = train("llama3")
    ours = Tokenizer.from_file(write_gguf(tmp_path / "model.safetensors"))
    for text in CORPUS[::20]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (0, 1, (1,))
    assert ours([""])["input_ids"] == [[0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5', supported are 'gpt2'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'.*smollm"),
        ({"eos": 99_999}, "eos_token_id is 99999"),
        ({"types": [1]}, "token_type has 1 entries"),
        ({"tokens": ["a", "a"], "types": [1, 1]}, "has ids 0 and 1"),
    ],
)
def test_gguf_that_cannot_be_exact_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(write_gguf(tmp_path / "x.gguf", **changes))


def test_gguf_metadata_equals_the_gguf_library(smollm2_file: Path) -> None:
    from gguf import GGUFReader

    ours, _ = read_gguf_metadata(smollm2_file, lambda key: True)
    theirs = {key: field.contents() for key, field in GGUFReader(smollm2_file).fields.items() if "GGUF" not in key}
    assert ours == theirs


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_gguf(part: float, smollm2_file: Path, tmp_path: Path) -> None:
    with smollm2_file.open("rb") as file:
        data = file.read(2_000_000)
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * part * 0.5)])
    with pytest.raises(TokenizerError, match="truncated or damaged"):
        Tokenizer.from_file(tmp_path / "cut.gguf")


def test_directory_settings(tmp_path: Path) -> None:
    train("llama3").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "a"})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (0, 1, None, (1, 7))
    assert tokenizer("the")["input_ids"][0] == 0
    assert tokenizer.vocabulary.chat_template == "a"
    (tmp_path / "chat_template.jinja").write_text("b")
    assert Tokenizer.from_pretrained(tmp_path).vocabulary.chat_template == "b"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1_000_000}))
    with pytest.raises(TokenizerError, match="eos_token_id has 1000000"):
        Tokenizer.from_pretrained(tmp_path)


def test_every_special_name_is_unique() -> None:
    assert len(set(SPECIAL_TOKENS)) == 256
