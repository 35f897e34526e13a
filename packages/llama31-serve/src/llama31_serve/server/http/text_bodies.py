"""TGI's and MindIE's `inputs` bodies, and vLLM's `prompt` body: JSON in, the shared GenerationRequest out.

Defaults: TGI's docs/openapi.json, MindIE 1.0's pages on /generate and /infer, vLLM's SamplingParams.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import Grammar
from llama31_serve.server.generation_request import GenerationRequest, Limits
from llama31_serve.server.http.body import Body, checked_request, or_else, strings
from llama31_serve.server.text import TextWorker

DEFAULT_MAX_NEW_TOKENS = 20
TEXT_NAMES = {
    "text": "inputs",
    "input": "inputs",
    "temperature": "parameters.temperature",
    "top_k": "parameters.top_k",
    "top_p": "parameters.top_p",
    "typical_p": "parameters.typical_p",
    "repetition_penalty": "parameters.repetition_penalty",
    "frequency_penalty": "parameters.frequency_penalty",
    "presence_penalty": "parameters.presence_penalty",
    "max_tokens": "parameters.max_new_tokens",
    "seed": "parameters.seed",
    "stop_strings": "parameters.stop",
    "truncate_prompt_to": "parameters.truncate",
    "deadline_s": "parameters.timeout",
    "priority": "parameters.priority",
    "logprobs": "parameters.top_n_tokens",
    "adapter": "parameters.adapter_id",
    "grammar": "parameters.grammar",
}
PROMPT_NAMES = {"text": "prompt", "input": "prompt", "stop_strings": "stop", "adapter": "model"}


class TextGrammar(Body):
    """TGI's `grammar`."""

    type: Literal["json", "regex"]
    value: Any

    def grammar(self) -> Grammar:
        """What the completion has to obey."""
        source = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return Grammar("regex" if self.type == "regex" else "json_schema", source)


class TextParameters(Body):
    """`parameters` of TGI's and MindIE's bodies."""

    adapter_id: str | None = None
    batch_size: int | None = None
    best_of: int | None = None
    decoder_input_details: bool = False
    details: bool = False
    do_sample: bool | None = None
    frequency_penalty: float | None = None
    grammar: TextGrammar | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    max_new_tokens: int | None = None
    presence_penalty: float | None = None
    priority: int | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    timeout: float | None = None
    top_k: int | None = None
    top_n_tokens: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool = False

    @property
    def samples(self) -> bool:
        """What `do_sample` says; unsaid, whether anything about drawing was said."""
        drawn = (self.temperature, self.top_k, self.top_p, self.typical_p, self.seed)
        return self.do_sample if self.do_sample is not None else any(value is not None for value in drawn)


class TextBody(Body):
    """POST /generate, /generate_stream and /infer. `model` and `id` are taken for MindIE's sake."""

    inputs: str
    parameters: TextParameters = Field(default_factory=TextParameters)
    stream: bool = False
    model: str | None = None
    id: str | None = None


class PromptBody(Body):
    """vLLM's POST /generate, and llama.cpp's `cache_prompt`. Without `max_tokens` the server's default holds."""

    prompt: str
    stream: bool = False
    model: str | None = None
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    use_beam_search: Literal[False] = False
    cache_prompt: bool = True


def read_text_body(body: TextBody, text: TextWorker, limits: Limits, request_id: str | None) -> GenerationRequest:
    """Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    asked = body.parameters
    wrong = [] if body.inputs else [FieldViolation("inputs", "is empty; give at least one character")]
    if asked.watermark:
        wrong.append(FieldViolation("parameters.watermark", "is true, but this server marks nothing; leave it out"))
    if asked.best_of not in (None, 1):
        wrong.append(FieldViolation("parameters.best_of", f"is {asked.best_of}, allowed is 1"))
    details = asked.details or asked.decoder_input_details
    checked = GenerationRequest(
        prompt=text.as_trained(body.inputs),
        **_id(body.id or request_id),
        temperature=or_else(asked.temperature, 1.0) if asked.samples else 0.0,
        top_k=max(or_else(asked.top_k, 0), 0) if asked.samples else 0,
        top_p=or_else(asked.top_p, 1.0) if asked.samples else 1.0,
        typical_p=or_else(asked.typical_p, 1.0) if asked.samples else 1.0,
        repetition_penalty=or_else(asked.repetition_penalty, 1.0),
        presence_penalty=or_else(asked.presence_penalty, 0.0),
        frequency_penalty=or_else(asked.frequency_penalty, 0.0),
        seed=asked.seed,
        max_tokens=or_else(asked.max_new_tokens, DEFAULT_MAX_NEW_TOKENS),
        clamp_max_tokens=True,
        stop_strings=strings(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids or ()),
        include_stop_string=or_else(asked.include_stop_str_in_output, True),
        ignore_eos=bool(asked.ignore_eos),
        include_special_tokens=asked.skip_special_tokens is False,
        logprobs=or_else(asked.top_n_tokens, 0) if details else None,
        prompt_logprobs=0 if asked.decoder_input_details else None,
        grammar=None if asked.grammar is None else asked.grammar.grammar(),
        priority=or_else(asked.priority, 0),
        adapter=asked.adapter_id or None,
        truncate_prompt_to=asked.truncate,
        deadline_s=asked.timeout,
    )
    return checked_request(checked, limits, wrong, TEXT_NAMES)


def read_prompt_body(
    body: PromptBody, text: TextWorker, limits: Limits, request_id: str | None, adapter: str | None
) -> GenerationRequest:
    """Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    wrong = [] if body.prompt else [FieldViolation("prompt", "is empty; give at least one character")]
    if body.best_of not in (None, body.n):
        wrong.append(FieldViolation("best_of", f"is {body.best_of}, allowed is n ({body.n})"))
    checked = GenerationRequest(
        prompt=text.as_trained(body.prompt),
        **_id(request_id),
        n=body.n,
        temperature=body.temperature,
        top_k=max(or_else(body.top_k, 0), 0),
        top_p=body.top_p,
        min_p=body.min_p,
        typical_p=body.typical_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        max_tokens=body.max_tokens,
        clamp_max_tokens=True,
        min_tokens=body.min_tokens,
        stop_strings=strings(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_string=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        include_special_tokens=not body.skip_special_tokens,
        adapter=adapter,
        use_prefix_cache=body.cache_prompt,
    )
    return checked_request(checked, limits, wrong, PROMPT_NAMES)


def _id(request_id: str | None) -> dict[str, Any]:
    return {} if request_id is None else {"request_id": request_id}
