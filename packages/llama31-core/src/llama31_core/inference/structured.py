"""Completions that obey a JSON schema, a regular expression, a grammar or a list of choices: a grammar and the bytes of
every token in, masks of the tokens that may follow out.

Over llguidance (the extra `structured`), which knows nothing of the tokenizer but those bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama31_core.errors import ConfigError, RequestError, SamplingError
from llama31_core.inference.logits_mask import LogitsMask, LogitsMaskFactory

_MAX_SHOWN = 60
# Between the tokens of JSON: a bounded run, as a model left to itself may write blanks for ever.
_JSON_BLANKS = r"[ ]{1,2}|\n[ ]{0,20}"


class GrammarCompiler:
    """Makes mask factories for `SamplingParams.logits_mask`. Built once for a tokenizer; used by any thread.

    Args:
        token_bytes: what each token of the model's vocabulary stands for; b"" for those that stand for no text.
        eos_ids: what may end a completion; the request must have them as stop ids too.
        special_ids: further tokens that never are part of a text (begin of text, headers, …).

    Raises:
        ConfigError: llguidance is not installed, or no token can end a completion.
    """

    def __init__(self, token_bytes: Sequence[bytes], eos_ids: Sequence[int], special_ids: Sequence[int] = ()) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError("structured output needs llguidance; pip install 'llama31-core[structured]'") from error
        self._size = len(token_bytes)
        if not eos_ids or any(not 0 <= token < self._size for token in eos_ids):
            raise ConfigError(f"eos_ids is {list(eos_ids)}, allowed is at least one of 0 to {self._size - 1}")
        eos = sorted(set(eos_ids))
        vocabulary = _Vocabulary(token_bytes, sorted({*special_ids, *eos}), eos[0])
        self._matcher, self._limits = llguidance.LLMatcher, llguidance.LLParserLimits(verbose_errors=False)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary),
            n_vocab=self._size,
            eos_token=eos,
            slices=llguidance.LLTokenizer.json_slices(),
        )

    def json_schema(self, schema: Mapping[str, Any] | bool | str) -> LogitsMaskFactory:
        """JSON that a schema (draft 2020-12, itself JSON if it is a string) accepts; `True` or `{}` for any JSON.

        Blanks between its tokens are bounded. Raises RequestError for one that is none, that nothing fits, or that
        has keywords which llguidance does not honour.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        build = self._matcher.grammar_from_json_schema
        return self._compile("json_schema", lambda: build(text, defaults={"whitespace_pattern": _JSON_BLANKS}))

    def json_object(self) -> LogitsMaskFactory:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> LogitsMaskFactory:
        """A text that a regular expression (Rust's syntax: no look-around, no back-references) matches as a whole.

        Raises RequestError for one that is none, or that matches nothing.
        """
        return self._compile("regex", lambda: self._matcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> LogitsMaskFactory:
        """A text that a context-free grammar in Lark's notation derives from `start`.

        Raises RequestError for one that is none, or that derives nothing.
        """
        return self._compile("lark", lambda: self._matcher.grammar_from_lark(grammar))

    def choice(self, texts: Sequence[str]) -> LogitsMaskFactory:
        """One of these texts. Raises RequestError if there is none, or an empty one."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise RequestError(f"choice is {texts!r}, allowed is a list of at least one text that is not empty")
        return self._compile("choice", lambda: self._matcher.grammar_from_regex("|".join(map(_literal, texts))))

    def _compile(self, kind: str, make: Callable[[], str]) -> LogitsMaskFactory:
        try:
            matcher = self._matcher(self._tokenizer, make(), log_level=0, limits=self._limits)
        except (TypeError, ValueError) as error:  # no JSON, no text, or none that is Unicode
            raise RequestError(f"{kind} cannot be used: {error}") from error
        if matcher.is_error():
            raise RequestError(f"{kind} cannot be used: {_reason(matcher.get_error())}")
        try:
            _GrammarMask(matcher.deep_copy(), self._size).allowed()
        except SamplingError as error:
            raise RequestError(f"{kind} cannot be used: no text obeys it that this model's tokens can write") from error
        return lambda: _GrammarMask(matcher.deep_copy(), self._size)


class _GrammarMask(LogitsMask):
    """Follows one completion through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """See LogitsMask."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(packed, count=self._size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """See LogitsMask."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def terminated(self) -> bool:
        """See LogitsMask."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SamplingError(f"the grammar cannot go on: {_reason(self._matcher.get_error())}")


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, token_bytes: Sequence[bytes], special_ids: Sequence[int], eos_id: int) -> None:
        self.tokens = [bytes(token) for token in token_bytes]
        self.special_token_ids = list(special_ids)
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._id_of = {token: index for index, token in reversed(list(enumerate(self.tokens))) if token}
        self._longest = max(map(len, self.tokens))

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text, the longest first. No mask depends on it."""
        data = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        while data:
            size = next((n for n in range(min(self._longest, len(data)), 0, -1) if data[:n] in self._id_of), None)
            if size is None:
                raise ValueError(f"no token begins {data[:_MAX_SHOWN]!r}")
            ids.append(self._id_of[data[:size]])
            data = data[size:]
        return ids


def _literal(text: str) -> str:
    """A regular expression that matches this text alone."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _reason(message: str) -> str:
    """The line that says why: llguidance shows the place before and after it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
