"""Saved vocabularies: the same ids here and in transformers' AutoTokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import ChatFormat, Tokenizer, TokenizerError

TEXTS = (
    "It's 1,234,567 — “quoted”  \n\n x\r\n",
    "昇腾处理器上的大语言模型，支持8卡 😀👩‍👩‍👧",
    "<|begin_of_text|><|im_start|>user<|eot_id|><|finetune_right_pad_id|>",
    "def f(x):\n\treturn x**2  # ok\n" + "\x04\x13\U00040000",
)


@pytest.fixture(scope="session", params=["llama3", "smollm2"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer, Any, Path]:
    """A tokenizer, itself loaded again, transformers' of the same directory, and the directory."""
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    directory = tmp_path_factory.mktemp(request.param) / "new" / "model"
    tokenizer.save_pretrained(directory)
    return tokenizer, Tokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(directory), directory


# A code point that got its meaning after a library's Unicode tables were made is a letter to some libraries and not to
# others (U+3D000 is one), and they cut a text differently; Python 3.11's tables are older than all of theirs.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(text=st.sampled_from(TEXTS) | st.text(ASSIGNED, max_size=80))
def test_same_ids(text: str, saved: tuple[Tokenizer, Tokenizer, Any, Path]) -> None:
    original, again, theirs, _ = saved
    ids = original.encode(text)
    assert again.encode(text) == ids
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
    allowed = original.encode(text, allowed_special="all")
    assert again.encode(text, allowed_special="all") == allowed
    assert theirs.encode(text, add_special_tokens=False) == allowed
    assert theirs.decode(allowed) == original.decode(allowed)


def test_same_settings(saved: tuple[Tokenizer, Tokenizer, Any, Path]) -> None:
    original, again, theirs, _ = saved
    assert again.special_tokens == original.special_tokens
    assert again.vocabulary.controls.add_bos == original.vocabulary.controls.add_bos
    assert (again.bos_id, again.eos_id, again.pad_id) == (original.bos_id, original.eos_id, original.pad_id)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (again.bos_id, again.eos_id, again.pad_id)
    assert len(theirs) == original.vocab_size
    assert theirs("x").input_ids == original("x").input_ids


def test_same_dialogs(saved: tuple[Tokenizer, Tokenizer, Any, Path]) -> None:
    original, again, theirs, _ = saved
    dialog: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Sunny.  "},
        {"role": "user", "content": "Sure?"},
    ]
    ids = ChatFormat(original).encode_dialog(dialog, add_generation_prompt=True).ids
    assert ChatFormat(again).encode_dialog(dialog, add_generation_prompt=True).ids == ids
    assert theirs.apply_chat_template(dialog, add_generation_prompt=True, tokenize=True)["input_ids"] == ids


def test_llama3_template_writes_tool_calls_as_the_format_does(llama3: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    llama3.save_pretrained(tmp_path)
    dialog: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "stop_reason": "end_of_message",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": {"t": "22 °C"}},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(dialog, tokenize=True)["input_ids"]
    assert theirs == ChatFormat(llama3).encode_dialog(dialog).ids


def test_ranks_are_written_where_they_fit(saved: tuple[Tokenizer, Tokenizer, Any, Path], llama3_file: Path) -> None:
    original, _, _, directory = saved
    ranks = directory / "tokenizer.model"
    assert ranks.exists() == (original.vocab_size == 128_256)
    if ranks.exists():
        assert ranks.read_bytes() == llama3_file.read_bytes()
    assert not list(directory.glob(".*"))


def test_directory_that_cannot_be_written(llama3: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="cannot be written"):
        llama3.save_pretrained(tmp_path / "file" / "model")
