"""The tokenizer files that llama31-ckpt writes from a GGUF vocabulary, read by our tokenizer and by transformers."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from llama31_ckpt.cli import main
from llama31_tokenizer import Tokenizer
from model_assets import fetch

TEXTS = (
    "Hello world",
    "  leading and trailing  ",
    "In 2024 there were 1,234,567 people; 3.14159 is pi.",
    "don't can't we'll I'm they've he'd",
    "naïve café Ünïcödé ñandú — “quotes” … ellipsis",
    "中文分词 日本語のテキスト 한국어 العربية עברית हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 👍🏽 and zero\u200bwidth",
    "def f(x):\n\treturn x ** 2  # comment\n\n\nprint(f(10))\r\n",
    "<|im_start|>user\nplain text that looks special<|im_end|>",
    "\x00\x01\x7f control \ufeff bom \u00a0 nbsp",
    "a" * 300,
    " " * 70 + "x" + "\n" * 9,
    "",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ckpt") / "smollm2"
    command = ["convert", "--input_path", str(fetch("smollm2-gguf")), "--output_path", str(path), "--dtype", "bf16"]
    assert main(command) == 0
    return path


@pytest.fixture(scope="module")
def written(model_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_dir)


def _random_texts(count: int) -> list[str]:
    rng = random.Random(20241)
    alphabet = "abcXYZ 019.,'\n\t-_éß中👍ĠĊ<|>"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("text", TEXTS)
def test_llama31_tokenizer_and_transformers_give_the_same_ids(text: str, model_dir: Path, written: Any) -> None:
    assert Tokenizer.from_pretrained(model_dir).encode(text, allowed_special="all") == written.encode(text)


def test_random_texts_get_the_same_ids(model_dir: Path, written: Any) -> None:
    ours = Tokenizer.from_pretrained(model_dir)
    differing = [
        text for text in _random_texts(500) if ours.encode(text, allowed_special="all") != written.encode(text)
    ]
    assert differing == []


@pytest.fixture
def reference(tmp_path: Path) -> Any:
    """transformers' own reading of the GGUF file."""
    (tmp_path / "model.gguf").symlink_to(fetch("smollm2-gguf"))  # alone: other tokenizer files beside it would be read
    return transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")


def test_transformers_reading_the_gguf_by_itself_gives_the_same_ids(written: Any, reference: Any) -> None:
    assert written.get_vocab() == reference.get_vocab()
    # transformers does not know the split named "smollm" and takes GPT-2's, which differs at digits only.
    texts = [re.sub(r"\d", "", text) for text in (*TEXTS, *_random_texts(500))]
    assert [text for text in texts if written.encode(text) != reference.encode(text)] == []


def test_digits_are_split_as_llama_cpp_does_for_smollm(written: Any, reference: Any) -> None:
    llama_cpp_split = [Split(Regex(r"\p{N}"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=True)]
    reference.backend_tokenizer.pre_tokenizer = Sequence(llama_cpp_split)
    texts = [*TEXTS, *_random_texts(500), "a \n1", "x  ½ ² Ⅷ ٣"]
    assert [text for text in texts if written.encode(text) != reference.encode(text)] == []


def test_chat_template_and_special_tokens_come_along(written: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    assert written.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (written.bos_token, written.eos_token, written.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert written.encode("<|im_end|>") == [2]
