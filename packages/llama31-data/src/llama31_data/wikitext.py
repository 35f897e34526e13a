"""A paragraph of WikiText in its tokenised spelling in, ordinary spelling out: the rules of MindFormers' script.

They come from NVIDIA's Megatron-LM, tasks/zeroshot_gpt/detokenizer.py. Here they see one paragraph at a time, so a
quotation mark without its partner in one paragraph does not take hold of the next.
"""

from __future__ import annotations

import re

_SIMPLE = (
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_ENCLOSED = (
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)
_LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def clean_wikitext(text: str) -> str:
    """The paragraph with " @-@ ", spaced punctuation, spaced brackets and the like undone."""
    text = text.replace("s '", "s'")
    for old, new in _SIMPLE:
        text = text.replace(old, new)
    for pattern, replacement in _ENCLOSED:
        text = pattern.sub(replacement, text)
    for old, new in _LAST:
        text = text.replace(old, new)
    return text


def is_heading(text: str) -> bool:
    """Whether a paragraph is a heading (" = Title = "), which MindFormers leaves out."""
    return text.strip().startswith("=")
