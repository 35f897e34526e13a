"""What one request asks of the sampler, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llama31_core.errors import RequestError
from llama31_core.inference.logits_mask import LogitsMaskFactory

MAX_LOGPROBS = 100
MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
        max_tokens: tokens to generate at most; None for as many as the context holds.
        min_tokens: the ids that would end the request are not drawn before this many tokens.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020); 1 for all.
        min_p: leave out tokens less likely than this share of the most likely one (Nguyen et al. 2024); 0 for none.
        typical_p: sample among the tokens nearest to the expected surprise, until they reach p (Meister et al. 2023,
            locally typical sampling); 1 for all.
        repetition_penalty: divides the positive logits of every token of prompt and completion so far, and multiplies
            the negative ones (Keskar et al. 2019, section 4.1); 1 for none.
        presence_penalty: taken from the logit of every token of the completion so far.
        frequency_penalty: the same, as often as the token is there.
        logit_bias: added to the logits of these token ids.
        bad_words_ids: sequences of ids that are never completed; one of a single id is never drawn.
        logprobs: report the log-probability of every drawn token and of this many most likely ones, of the model's own
            logits; None for no report.
        seed: makes sampling repeatable; None draws a fresh one.
        stop_token_ids: end the request, beside the model's own end ids. They are not part of the completion.
        ignore_eos: the model's own end ids do not end the request.
        n: completions of the prompt, which is computed once; completion i draws with seed + i. With beams: how many of
            the best are reported.
        prompt_logprobs: report the log-probability of every prompt token and of this many likeliest ones in its place.
        logits_mask: restricts the completion (see `structured`).
        num_beams: beam search of so many beams, without sampling; 1 for none.
        length_penalty: a beam's log-probability is divided by its length to this power; more than 0 favours long ones.
        early_stopping: end the search as soon as there are `num_beams` ended beams (True), when a running beam could
            not become better than them at its length now (False), or at any length it could reach ("never").
        use_prefix_cache: take what the cache has of other requests' beginnings, and leave this one's to others.

    Raises:
        RequestError: a value outside its range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    n: int = 1
    prompt_logprobs: int | None = None
    logits_mask: LogitsMaskFactory | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    use_prefix_cache: bool = True

    def __post_init__(self) -> None:
        self._freeze("stop_token_ids", "a sequence of token ids", tuple)
        self._freeze("logit_bias", "a mapping of token ids to numbers", dict)
        self._freeze("bad_words_ids", "a sequence of sequences of token ids", lambda words: tuple(map(tuple, words)))
        self._need("max_tokens", ">= 1 or None", self.max_tokens is None or _is_int(self.max_tokens, 1))
        self._need("min_tokens", "an integer >= 0", _is_int(self.min_tokens, 0))
        # A smaller one would carry the logits out of the range of numbers.
        warm = _is_number(self.temperature) and (self.temperature == 0 or self.temperature >= MIN_TEMPERATURE)
        self._need("temperature", f"0 (greedy) or >= {MIN_TEMPERATURE}", warm)
        self._need("top_k", "an integer >= 0 (0 for all)", _is_int(self.top_k, 0))
        self._need("top_p", "in (0, 1]", _is_number(self.top_p) and 0 < self.top_p <= 1)
        self._need("min_p", "in [0, 1]", _is_number(self.min_p) and 0 <= self.min_p <= 1)
        self._need("typical_p", "in (0, 1]", _is_number(self.typical_p) and 0 < self.typical_p <= 1)
        self._need("repetition_penalty", "> 0", _is_number(self.repetition_penalty) and self.repetition_penalty > 0)
        self._need("presence_penalty", "a number", _is_number(self.presence_penalty))
        self._need("frequency_penalty", "a number", _is_number(self.frequency_penalty))
        self._need("seed", "an integer >= 0 or None", self.seed is None or _is_int(self.seed, 0))
        self._need("stop_token_ids", "token ids >= 0", all(_is_int(token, 0) for token in self.stop_token_ids))
        biases = all(_is_int(token, 0) and _is_number(bias) for token, bias in self.logit_bias.items())
        self._need("logit_bias", "token ids >= 0 with numbers", biases)
        words = all(word and all(_is_int(token, 0) for token in word) for word in self.bad_words_ids)
        self._need("bad_words_ids", "sequences of at least one token id >= 0", words)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            self._need(name, f"0 to {MAX_LOGPROBS}, or None", count is None or _is_int(count, 0, MAX_LOGPROBS))
        self._need("n", "an integer >= 1", _is_int(self.n, 1))
        self._need("num_beams", "an integer >= 1", _is_int(self.num_beams, 1))
        self._need("length_penalty", "a number", _is_number(self.length_penalty))
        early = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        self._need("early_stopping", 'True, False or "never"', early)
        masked = self.logits_mask is None or callable(self.logits_mask)
        self._need("logits_mask", "a function that makes a mask", masked)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it")
        if self.logits_mask is not None and self.ignore_eos:
            raise RequestError("ignore_eos does not go with logits_mask, which says when a completion may end")
        if self.num_beams == 1:
            return
        if self.temperature != 0 or self.logprobs is not None or self.logits_mask is not None:
            raise RequestError("num_beams > 1 needs temperature=0 and goes with neither logprobs nor logits_mask")
        if self.n > self.num_beams:
            raise RequestError(f"n={self.n} is more than num_beams={self.num_beams}; lower it or raise num_beams")

    def _freeze(self, name: str, allowed: str, kind: Callable[[Any], object]) -> None:
        try:
            object.__setattr__(self, name, kind(getattr(self, name)))
        except (TypeError, ValueError) as error:
            raise RequestError(f"{name} is {getattr(self, name)!r}, allowed is {allowed}") from error

    def _need(self, name: str, allowed: str, holds: bool) -> None:
        if not holds:
            raise RequestError(f"{name} is {getattr(self, name)!r}, allowed is {allowed}")

    def named_ids(self) -> dict[str, int]:
        """The largest token id that each parameter names, for the check against the vocabulary."""
        ids = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(self.logit_bias),
            "bad_words_ids": tuple(token for word in self.bad_words_ids for token in word),
        }
        return {name: max(named) for name, named in ids.items() if named}


def _is_int(value: object, least: int, most: int | None = None) -> bool:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        return False
    return int(value) >= least and (most is None or int(value) <= most)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and math.isfinite(value)
