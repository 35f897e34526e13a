"""A request as it was accepted, and what the engine reports of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama31_core.inference.sampling import TokenLogprobs
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.lora.table import LoadedAdapter

FinishReason = Literal["stop", "length", "abort", "error"]
PromptLogprobs = list[TokenLogprobs | None]


@dataclass(frozen=True)
class Completion:
    """The tokens generated for one prompt (without the one that stopped it) and why they ended.

    Attributes:
        token_ids: what was generated.
        finish_reason: "stop", "length" or "error".
        logprobs: an entry for every token if the request asked for them.
        index: which of the request's n completions this is.
        error: what went wrong, if the reason is "error".
        prompt_logprobs: an entry for every token of the prompt, None for the first, if the request asked for them.
        score: of a beam: its log-probability over its length to the power of the length penalty.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    error: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    score: float | None = None


@dataclass(frozen=True)
class StepOutput:
    """What one step of the engine added to one completion; `finish_reason` is None while it goes on.

    The attributes are those of `Completion`; `prompt_logprobs` come with the first output of index 0. Beams are
    reported when the search has ended, all in one step.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    error: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and what is wanted of it, checked.

    Attributes:
        request_id: the caller's name for it.
        prompt_ids: the prompt.
        params: how to sample.
        max_tokens: tokens to generate at most, a number.
        stop_ids: what ends a completion.
        arrival_s: when it came, on the engine's clock.
        urgency: less is served earlier; no two requests have the same.
        adapter: what computes with the base model; None for that alone.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    arrival_s: float
    urgency: tuple[float, int]
    adapter: LoadedAdapter | None = None
