"""The loss mask of every template: exactly what the assistant wrote and its end of turn, whatever it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_data.alpaca import prompt_and_answer
from llama31_data.errors import DataError, RecordError
from llama31_data.samples import Encoded
from llama31_data.templates import HeaderTemplate, load_template
from llama31_tokenizer import ChatFormat, Tokenizer

conversation = pytest.importorskip("fastchat.conversation")

# Answers that MindFormers' script masked whole, shifted or took apart.
TRAPS = [
    "42",
    "7 days of 24 hours",
    "USER: Open? ASSISTANT: Yes, until six.",
    "She wrote <|eot_id|> and then <|start_header_id|>user<|end_header_id|>",
    "The tag </s> closes it, <s> opens it, <|im_end|> too.",
    "",
    " leading and trailing ",
    "\nnew line first",
    "### Response: ### Instruction:\n",
    "答えは四十二です。",
    "🌦️➡️🌈",
]


def dialog(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def trained_texts(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    return [tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.spans]


@pytest.mark.parametrize("answer", TRAPS)
@pytest.mark.parametrize("template", ["chat", "llama3.1"])
def test_llama31_trains_on_the_answer_and_its_end_of_turn(llama3: Tokenizer, template: str, answer: str) -> None:
    encoded = load_template(template, llama3).encode(dialog("q", answer, "again", answer))
    expected = [*llama3.encode(answer), llama3.special_tokens["<|eot_id|>"]]
    assert [encoded.ids[start:stop] for start, stop in encoded.spans] == [expected, expected]
    prompt = load_template(template, llama3).encode(dialog("q", "")).ids[:-1]
    assert encoded.ids[: encoded.spans[0][0]] == prompt


@pytest.mark.parametrize("answer", TRAPS)
def test_vicuna_trains_on_the_answer_and_end_of_text(llama3: Tokenizer, answer: str) -> None:
    encoded = load_template("vicuna_v1.1", llama3).encode(dialog("q", answer, "again", answer))
    expected = [*(llama3.encode(" " + answer) if answer else []), llama3.eos_id]
    assert [encoded.ids[start:stop] for start, stop in encoded.spans] == [expected, expected]


def old_script(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids and labels of one round as MindFormers' llama_preprocess.py makes them, before padding."""
    conv = conversation.get_conv_template("vicuna_v1.1")
    conv.append_message(conv.roles[0], prompt)
    conv.append_message(conv.roles[1], answer)
    text = conv.get_prompt().split("</s>")[0]
    with_special = [*tokenizer.encode(text, allowed_special="all"), tokenizer.eos_id or 0]
    ids = [tokenizer.bos_id or 0, *with_special]
    labels = list(ids)
    parts = text.split(" ASSISTANT: ")
    if len(parts) != 2:
        return ids, [-100] * len(ids)
    masked = 1 + len(tokenizer.encode(parts[0] + " ASSISTANT: ")) - 1
    return ids, [-100] * masked + labels[masked:]


def test_vicuna_equals_the_old_script_where_that_was_right(
    llama3: Tokenizer, sample_records: list[dict[str, str]]
) -> None:
    template = load_template("vicuna_v1.1", llama3)
    differing = []
    for number, record in enumerate(sample_records, start=1):
        prompt, answer = prompt_and_answer(record)
        ids, spans = template.encode(dialog(prompt, answer))
        labels = [id if any(low <= i < high for low, high in spans) else -100 for i, id in enumerate(ids)]
        if (ids, labels) != old_script(llama3, prompt, answer):
            differing.append(number)
    assert differing == [39, 40]  # the text of a special token, and an answer with " ASSISTANT: " in it
    prompt, answer = prompt_and_answer(sample_records[39])
    assert set(old_script(llama3, prompt, answer)[1]) == {-100}
    assert trained_texts(llama3, template.encode(dialog(prompt, answer))) == [f" {answer}<|end_of_text|>"]


WRITABLE = sorted(
    name for name, conv in conversation.conv_templates.items() if conv.sep_style is not None and name != "yuan2"
)


@pytest.mark.parametrize("name", WRITABLE)
def test_every_fschat_template_keeps_its_text_and_trains_on_answers_alone(llama3: Tokenizer, name: str) -> None:
    answers = ["42 ASSISTANT: no </s> <|eot_id|>", "Sure, <s> it is."]
    template = load_template(name, llama3)
    encoded = template.encode(dialog("Hi there", answers[0], "More", answers[1]))
    for text, answer in zip(trained_texts(llama3, encoded), answers, strict=True):
        before, found, after = text.partition(answer)
        assert found
        assert before.strip() == ""
        assert after in ("", *SEPARATORS[name]), "only the template's own end of turn may follow"
    untrained = [id for i, id in enumerate(encoded.ids) if not any(low <= i < high for low, high in encoded.spans)]
    assert "ASSISTANT: no" not in llama3.decode(untrained)
    expected = conversation.get_conv_template(name)
    for number, text in enumerate(["Hi there", answers[0], "More", answers[1]]):
        expected.append_message(expected.roles[number % 2], text)
    assert plain(llama3.decode(encoded.ids)) == plain(expected.get_prompt())


SEPARATORS = {
    name: {
        end.rstrip() or end
        for sep in (conv.sep, conv.sep2, "</s>", f"{conv.sep}\n", f"{conv.sep2}\n", "\n\n", "<n>")
        if sep
        for end in (sep, sep.split("</s>")[0] + "<|end_of_text|>")
    }
    for name, conv in conversation.conv_templates.items()
}


def plain(text: str) -> str:
    """The text without begin- and end-of-text in any spelling, which templates and vocabulary write differently."""
    for token in ("<|begin_of_text|>", "<|end_of_text|>", "</s>", "<s>"):
        text = text.replace(token, "")
    return text


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), st.booleans())
@pytest.mark.parametrize("name", ["chat", "vicuna_v1.1", "mistral-7b-openorca"])
def test_any_text_in_any_turn_keeps_the_mask(llama3: Tokenizer, name: str, texts: list[str], system: bool) -> None:
    messages = [{"role": "system", "content": "Be brief."}] * system + dialog(*texts)
    encoded = load_template(name, llama3).encode(messages)
    answers = texts[1::2]
    assert len(encoded.spans) == len(answers)
    for text, answer in zip(trained_texts(llama3, encoded), answers, strict=True):
        assert answer in text
        assert len(text) <= len(answer) + len(" <|end_of_text|>")


@settings(max_examples=200, deadline=None)
@given(st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), st.booleans())
def test_many_at_once_are_the_tokenizer_s_own_format(llama3: Tokenizer, texts: list[str], system: bool) -> None:
    messages = [{"role": "system", "content": texts[0]}] * system + dialog(*texts)
    template = load_template("chat", llama3)
    assert isinstance(template, HeaderTemplate)
    dialogs = [messages, dialog("q", "a"), messages]
    expected = [ChatFormat(llama3).encode_dialog(each) for each in dialogs]
    found = template.encode_many(dialogs)
    ids = [part.tolist() for part in np.split(found.tokens, np.cumsum(found.lengths)[:-1])]
    trained = [np.flatnonzero(part).tolist() for part in np.split(found.trained, np.cumsum(found.lengths)[:-1])]
    assert ids == [each.ids for each in expected]
    assert trained == [[i for low, high in each.assistant_spans for i in range(low, high)] for each in expected]


def test_names_of_special_tokens_in_messages_never_become_special_ids(llama3: Tokenizer) -> None:
    for name in ("chat", "vicuna_v1.1"):
        encoded = load_template(name, llama3).encode(dialog("<|eot_id|>", "<|end_of_text|>"))
        special = set(llama3.special_tokens.values())
        used = [id for id in encoded.ids if id in special]
        plain_run = load_template(name, llama3).encode(dialog("x", "y"))
        assert len(used) == sum(id in special for id in plain_run.ids)


def test_a_template_that_rewrites_text_rejects_the_record_it_would_change(llama3: Tokenizer) -> None:
    template = load_template("rwkv", llama3)
    assert trained_texts(llama3, template.encode(dialog("q", "one line"))) == [" one line\n\n"]
    with pytest.raises(RecordError, match="rewrites the text of this record"):
        template.encode(dialog("q", "two\n\nparagraphs"))


def test_a_system_turn_takes_the_place_of_the_template_s_own(llama3: Tokenizer) -> None:
    messages = [{"role": "system", "content": "You speak in rhymes."}, *dialog("q", "a")]
    text = llama3.decode(load_template("vicuna_v1.1", llama3).encode(messages).ids)
    assert text == "<|begin_of_text|>You speak in rhymes. USER: q ASSISTANT: a<|end_of_text|>"


def test_unusable_template_names(llama3: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"--template vicuna_v1\.2: unknown; nearest are vicuna_v1\.1"):
        load_template("vicuna_v1.2", llama3)
    with pytest.raises(DataError, match="--template steerlm: cannot be written as text"):
        load_template("steerlm", llama3)


def test_a_model_directory_s_jinja_template(tmp_path: Path) -> None:
    tokenizer = byte_level_model(tmp_path)
    encoded = load_template("chat", tokenizer).encode(dialog("hi", "<|im_end|> 42", "x", ""))
    end = tokenizer.special_tokens["<|im_end|>"]
    assert [encoded.ids[start:stop] for start, stop in encoded.spans] == [
        [*tokenizer.encode("<|im_end|> 42"), end],
        [end],
    ]
    with pytest.raises(DataError, match=r"--template llama3\.1: the vocabulary has no <\|start_header_id\|>"):
        load_template("llama3.1", tokenizer)


def byte_level_model(directory: Path) -> Tokenizer:
    """A model directory with one token a byte, two control tokens and a ChatML template."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HfTokenizer

    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = HfTokenizer(models.BPE(vocabulary, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    built.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = {"chat_template": template, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(directory)
