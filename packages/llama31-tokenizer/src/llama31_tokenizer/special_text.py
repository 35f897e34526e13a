"""Control tokens by name in a text: refused, read as ids, or left as text, as the caller says for each."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from llama31_tokenizer.bpe import compile_names
from llama31_tokenizer.errors import TokenizerError

SpecialSet = Collection[str] | Literal["all"]


def encode_with_special(
    text: str,
    encode: Callable[[str], list[int]],
    special_tokens: Mapping[str, int],
    allowed: SpecialSet,
    disallowed: SpecialSet,
) -> list[int]:
    """Ids of a text whose allowed names are control tokens.

    Args:
        text: what to encode.
        encode: of plain text.
        special_tokens: names and ids.
        allowed: names to read as ids.
        disallowed: names to refuse; "all" means those not allowed.

    Raises:
        TokenizerError: a disallowed name in the text, or an unknown one in a set.
    """
    allowed_names = _resolve(allowed, special_tokens, "allowed_special")
    disallowed_names = _resolve(disallowed, special_tokens, "disallowed_special")
    if disallowed == "all":
        disallowed_names -= allowed_names
    if disallowed_names and (found := _compile_names(disallowed_names).search(text)):
        raise TokenizerError(
            f"text has {found.group()!r} at character {found.start()}, which disallowed_special forbids; allow it in "
            "allowed_special, or leave disallowed_special empty to encode it as plain text"
        )
    if not allowed_names:
        return encode(text)
    ids: list[int] = []
    end = 0
    for match in _compile_names(allowed_names).finditer(text):
        if match.start() > end:
            ids += encode(text[end : match.start()])
        ids.append(special_tokens[match.group()])
        end = match.end()
    return ids + encode(text[end:]) if end < len(text) else ids


def _resolve(names: SpecialSet, special_tokens: Mapping[str, int], argument: str) -> frozenset[str]:
    if names == "all":
        return frozenset(special_tokens)
    unknown = [name for name in names if name not in special_tokens]
    if unknown or isinstance(names, str):
        got = repr(names) if isinstance(names, str) else repr(unknown[0])
        raise TokenizerError(f"{argument} has {got}, expected 'all' or a set of names in special_tokens")
    return frozenset(names)


@functools.lru_cache(maxsize=64)
def _compile_names(names: frozenset[str]) -> re.Pattern[str]:
    return compile_names(names)
