"""Pre-tokeniser patterns this package knows: name in, regular expression out.

A byte-level BPE first cuts the text into pieces with one regular expression and then merges bytes inside each piece.
Only patterns listed here are used: an unknown one would give ids that look right and are not, so files that ask
for another are refused with its name.

The GGUF names are llama.cpp's `tokenizer.ggml.pre` values (`src/llama-vocab.cpp`), the splits Hugging Face's
`pre_tokenizer` objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pattern:
    """One pre-tokeniser.

    Attributes:
        name: how messages call it.
        regex: the expression in tiktoken's syntax; its matches cover every text without a gap.
        digits: whether Hugging Face writes it as `Digits` before GPT-2's pattern.
        split: the `Regex` of Hugging Face's `Split`, or None for GPT-2's own, which `ByteLevel` has built in.
    """

    name: str
    regex: str
    split: str | None = None
    digits: bool = False


# The alternatives before the look-ahead are one group: the same matches, and tiktoken's engine then tries them in one
# automaton instead of one after the other (a third faster over code).
_SPACES = r"|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _SPACES
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"


def _group(split: str) -> str:
    return f"(?:{split.removesuffix(_SPACES)}){_SPACES}"


LLAMA3 = Pattern("llama-bpe", _group(_LLAMA3_SPLIT), split=_LLAMA3_SPLIT)
QWEN2 = Pattern("qwen2", _group(_QWEN2_SPLIT), split=_QWEN2_SPLIT)
GPT2 = Pattern("gpt-2", _group(_GPT2_WORDS))
# Every digit is a segment of its own before GPT-2's pattern runs, so a digit ends a run of spaces like the text's end.
SMOLLM = Pattern(
    "smollm", _group(_GPT2_WORDS.replace(r" ?\p{N}+", r"\p{N}")).replace(r"(?!\S)", r"(?![^\s\p{N}])"), digits=True
)

PATTERNS = (LLAMA3, QWEN2, GPT2, SMOLLM)

GGUF_PATTERNS: Mapping[str, Pattern] = {
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": QWEN2,
    "stablelm2": QWEN2,
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "olmo": GPT2,
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
    "refact": SMOLLM,
}


def pattern_of_pre_tokenizer(pre_tokenizer: Any) -> Pattern:
    """The pattern a tokenizer.json's `pre_tokenizer` object stands for.

    Raises:
        ValueError: it is none of the known ones; the message shows the part that is not.
    """
    steps = _flatten(pre_tokenizer)
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise ValueError(f"the last pre-tokenizer must be ByteLevel, not {_show(steps[-1:] or pre_tokenizer)}")
    *before, byte_level = steps
    if byte_level.get("add_prefix_space", True):
        raise ValueError("ByteLevel with add_prefix_space true changes the text and is not supported")
    uses_gpt2 = bool(byte_level.get("use_regex", True))
    if not before and uses_gpt2:
        return GPT2
    if len(before) == 1:
        step = before[0]
        if uses_gpt2 and step.get("type") == "Digits" and step.get("individual_digits") is True:
            return SMOLLM
        if not uses_gpt2 and step.get("type") == "Split" and step.get("behavior") == "Isolated":
            regex = (step.get("pattern") or {}).get("Regex")
            for pattern in PATTERNS:
                if pattern.split is not None and regex == pattern.split and not step.get("invert", False):
                    return pattern
    raise ValueError(f"unknown combination {_show(steps)}; known are {', '.join(p.name for p in PATTERNS)}")


def pre_tokenizer_of_pattern(pattern: Pattern) -> dict[str, Any]:
    """The inverse of `pattern_of_pre_tokenizer`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pattern.split}
    first: dict[str, Any]
    if pattern.split:
        first = {"type": "Split", "pattern": {"Regex": pattern.split}, "behavior": "Isolated", "invert": False}
    elif pattern.digits:
        first = {"type": "Digits", "individual_digits": True}
    else:
        return byte_level
    return {"type": "Sequence", "pretokenizers": [first, byte_level]}


def _flatten(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for part in pre_tokenizer.get("pretokenizers", []) for step in _flatten(part)]
    return [pre_tokenizer]


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "…"
