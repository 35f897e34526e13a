"""Ids against Meta's tokenizer and Hugging Face's `tokenizers`, over real and made-up text: identical."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import Tokenizer

SCRIPTS = {
    "english": "It's the children's 1,234,567th visit; they'LL say we'Ve DON'T — “quoted” … and so on.",
    "chinese": "昇腾处理器上的大语言模型，支持8卡并行训练。中文、標點「測試」！",
    "japanese": "日本語のトークナイザーは、カタカナとひらがなを正しく扱えますか？",
    "korean": "한국어 문장도 정확하게 토큰화되어야 합니다.",
    "arabic": "يجب أن تكون النتائج متطابقة تمامًا، ١٢٣٤٥.",
    "hebrew": "שָׁלוֹם עולם, זה מבחן עם ניקוד.",
    "hindi": "यह एक परीक्षण है — संख्या १२३४५६।",
    "thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "vietnamese": "Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau.",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇩🇪 😀😃 ❤️‍🔥 1️⃣",
    "code": "def f(x: int) -> int:\n\treturn x**2  # comment\r\n\r\n\n    if (a && b) {\n        c += 0x1F;\n    }\n",
    "spaces": "  \t \n \u3000\xa0 x\r\n\r\n   y    1 \n\n\n z   ",
    "specials": "<|begin_of_text|><|eot_id|> <|im_start|>user <|reserved_special_token_247|><|endoftext|>",
    "combining": "e\u0301 n\u0303 \u0130\u0131 ſ'ſ 'S K'K ǅ ﬁ \u200d\u200b\ufeff",
    "numbers": "0 00 000 0000 12345678901234567890 ½ Ⅷ ² 1e-10 3.14159",
}
PRIVATE = "".join(map(chr, (0x04, 0x06, 0x13, 0x1D, 0xF1, 0x40000, 0xE0001, 0xF0000, 0x10FFFF)))


def plain_hf(tokenizer: Any, text: str) -> list[int]:
    """Hugging Face's ids with control tokens read as text."""
    tokenizer.encode_special_tokens = True
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_equal_meta(name: str, llama3: Tokenizer, meta_tokenizer: Any) -> None:
    text = SCRIPTS[name]
    assert llama3.encode(text) == meta_tokenizer.encode(text, bos=False, eos=False)
    assert llama3.encode(text, bos=True, eos=True) == meta_tokenizer.encode(text, bos=True, eos=True)
    assert llama3.encode(text, allowed_special="all") == meta_tokenizer.encode(
        text, bos=False, eos=False, allowed_special="all"
    )
    assert llama3.decode(llama3.encode(text)) == text


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_equal_hugging_face(
    name: str, llama3: Tokenizer, hf_llama3: Any, smollm2: Tokenizer, hf_smollm2: Any
) -> None:
    text = SCRIPTS[name] + PRIVATE
    assert llama3.encode(text) == plain_hf(hf_llama3, text)
    assert smollm2.encode(text) == plain_hf(hf_smollm2, text)


def test_smollm2_bytes_without_token_are_left_out(smollm2: Tokenizer, hf_smollm2: Any) -> None:
    text = " !\x04! a\x13b\x14 \x16\x16 \U00040000x"
    assert smollm2.encode(text) == plain_hf(hf_smollm2, text)
    assert smollm2.decode(smollm2.encode("a\x04b")) == "ab"


# A code point that got its meaning after a library's Unicode tables were made is a letter to some libraries and not to
# others (U+3D000 is one), and they cut a text differently; Python 3.11's tables are older than all of theirs.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.lists(
    st.one_of(
        st.text(ASSIGNED, max_size=20),
        st.sampled_from(
            ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "123", "4", "\u3000", "é", "中", "!?", "\x04", "𝟘"]
        ),
        st.text(alphabet=" \n\r\t'sSlLdDtTmMreve1234567890.,!?-_", max_size=30),
    ),
    max_size=20,
).map("".join)


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(text=TEXTS)
@example(text="\n \n\n  \r\n x")
@example(text="12345   67 \n")
def test_any_text_equals_references(
    text: str, llama3: Tokenizer, meta_tokenizer: Any, hf_llama3: Any, smollm2: Tokenizer, hf_smollm2: Any
) -> None:
    ids = llama3.encode(text)
    assert ids == meta_tokenizer.encode(text, bos=False, eos=False)
    assert ids == plain_hf(hf_llama3, text)
    assert llama3.decode(ids) == text
    assert smollm2.encode(text) == plain_hf(hf_smollm2, text)
