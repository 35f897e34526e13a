"""SentencePiece models against the sentencepiece library itself."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import StreamDecoder, Tokenizer, TokenizerError

SENTENCES = [f"The quick brown fox number {n} jumps over 懒狗 and says: naïve café, isn't it?" for n in range(50)]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with Llama 2's options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "anything.bin"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def reference(model_file: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture(scope="session")
def llama2(model_file: Path) -> Tokenizer:
    return Tokenizer.from_file(model_file)


TEXTS = st.lists(
    st.sampled_from([*SENTENCES[0].split(" "), " ", "  ", "\n", "<s>", "12", "😀", "\u2581"]) | st.text(max_size=4)
).map("".join)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(text=TEXTS)
def test_equals_the_library(text: str, llama2: Tokenizer, reference: Any) -> None:
    ids = llama2.encode(text)
    assert ids == reference.encode(text)
    assert llama2.decode(ids) == reference.decode(ids)
    stream = StreamDecoder(llama2)
    assert "".join([*map(stream.push, ids), stream.flush()]) == llama2.decode(ids)
    found = llama2.encode_with_offsets(text)
    assert found.ids == ids
    data = text.encode()
    assert b"".join(data[start:end] for start, end in found.byte_spans.tolist()) == data
    for (start, end), (first, last) in zip(found.char_spans.tolist(), found.byte_spans.tolist(), strict=True):
        assert data[first:last] in text[start:end].encode()
    assert llama2.encode_to_numpy(text).tolist() == ids


def test_control_tokens(llama2: Tokenizer) -> None:
    assert (llama2.bos_id, llama2.eos_id, llama2.stop_ids) == (1, 2, (2,))
    assert dict(llama2.special_tokens) == {"<s>": 1, "</s>": 2}
    ids = llama2.encode("The fox", bos=True, eos=True)
    assert llama2.decode(ids) == "<s>The fox</s>"
    assert llama2.decode(ids, skip_special_tokens=True) == "The fox"
    assert 1 not in llama2.encode("<s>")
    assert llama2.encode("<s>", allowed_special="all") == [1]
    assert llama2("The").input_ids[0] == 1


def test_added_tokens_of_the_directory(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    config = {"added_tokens_decoder": {"400": {"content": "<pad>"}}, "pad_token": "<pad>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (401, 400)
    assert tokenizer.decode([400]) == "<pad>"
    with pytest.raises(TokenizerError, match=r"ids\[1\] is 401, .* 0 to 400"):
        tokenizer.decode([400, 401])


def test_json_beside_a_model_gives_way_to_it(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}})
    )
    assert Tokenizer.from_pretrained(tmp_path).vocabulary.kind == "sentencepiece"


def test_saved_model_is_the_same_file(llama2: Tokenizer, model_file: Path, tmp_path: Path) -> None:
    llama2.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model_file.read_bytes()
    assert Tokenizer.from_pretrained(tmp_path).encode("The fox") == llama2.encode("The fox")


def test_damaged_model(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.model").write_bytes(model_file.read_bytes()[:3001])
    with pytest.raises(TokenizerError, match="looks like a SentencePiece model"):
        Tokenizer.from_file(tmp_path / "cut.model")


def test_without_the_library(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match="needs the sentencepiece library"):
        Tokenizer.from_file(model_file)


def write_gguf(path: Path, model_file: Path, **changes: Any) -> Path:
    """The model's pieces, scores and kinds as llama.cpp's converter writes them, by the gguf library."""
    from gguf import GGUFWriter

    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    numbers = range(library.get_piece_size())

    def kind(number: int) -> int:
        tests = {2: library.is_unknown, 3: library.is_control, 5: library.is_unused, 6: library.is_byte}
        return next((value for value, holds in tests.items() if holds(number)), 1)

    fields: dict[str, Any] = {
        "tokens": [library.id_to_piece(number) for number in numbers],
        "scores": [library.get_score(number) for number in numbers],
        "kinds": [kind(number) for number in numbers],
        "eos": library.eos_id(),
        **changes,
    }
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(fields["tokens"])
    writer.add_token_scores(fields["scores"])
    writer.add_token_types(fields["kinds"])
    writer.add_bos_token_id(library.bos_id())
    writer.add_eos_token_id(fields["eos"])
    writer.add_eot_token_id(7)
    writer.add_chat_template("a template")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def llama2_gguf(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model_file))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(text=TEXTS)
def test_gguf_equals_the_model_it_was_made_from(text: str, llama2_gguf: Tokenizer, reference: Any) -> None:
    ids = llama2_gguf.encode(text)
    assert ids == reference.encode(text)
    assert llama2_gguf.decode(ids) == reference.decode(ids)


def test_gguf_states_roles_template_and_kind(llama2_gguf: Tokenizer, tmp_path: Path) -> None:
    assert (llama2_gguf.bos_id, llama2_gguf.eos_id, llama2_gguf.stop_ids) == (1, 2, (2, 7))
    assert (llama2_gguf.vocabulary.kind, llama2_gguf.vocabulary.chat_template) == ("gguf", "a template")
    assert llama2_gguf("fox")["input_ids"][0] == 1
    llama2_gguf.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(SENTENCES[3]) == llama2_gguf.encode(SENTENCES[3])
    assert (again.bos_id, again.eos_id, again.vocabulary.kind) == (1, 2, "sentencepiece")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.5]}, "tokenizer.ggml.scores has 1 entries, expected 400"),
        ({"kinds": [1] * 400}, "has 0 unknown, 0 bytes"),
        ({"kinds": [2, *[1] * 398, 9]}, r"kinds \[9\]"),
        ({"tokens": ["a"] * 400}, "399 twice"),
        ({"eos": 400}, "eos_token_id is 400, the vocabulary has 400 tokens"),
    ],
)
def test_gguf_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str, model_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.from_file(write_gguf(tmp_path / "x.gguf", model_file, **changes))
    assert str(tmp_path / "x.gguf") in str(error.value)
