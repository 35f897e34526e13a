"""OpenAI's bodies in, the shared GenerationRequest out. Extra fields of vLLM and one of llama.cpp
are known too (`extra_body` of a client).

Source: OpenAI's API reference on /v1/chat/completions and /v1/completions.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import Grammar, GrammarKind
from llama31_serve.server.generation_request import (
    ConversationInput,
    GenerationRequest,
    Limits,
    Prompt,
    message_violations,
    token_id_violations,
)
from llama31_serve.server.http.body import Body, checked_request, or_else, strings
from llama31_serve.server.serving_model import ServingModel

DEFAULT_COMPLETION_TOKENS = 16
ANY_OBJECT = '{"type":"object"}'
# vLLM's fields for a grammar and their kinds; the first that is set counts, then response_format.
GUIDED: dict[str, GrammarKind] = {
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "lark",
    "guided_json": "json_schema",
}
Object = dict[str, Any]


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool = False


class ResponseFormat(Body):
    """What an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Object | None = None

    def grammar(self) -> Grammar | None:
        """None for free text."""
        if self.type == "text":
            return None
        schema = (self.json_schema or {}).get("schema")
        return Grammar("json_schema", ANY_OBJECT if schema is None else json.dumps(schema))


class OpenAiBody(Body):
    """What both kinds of request have. `user`, `metadata` and `store` are for OpenAI's own books: nothing is kept."""

    model: str
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    stop: list[str] | str | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: Object | None = None
    store: bool | None = None
    # vLLM's.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    guided_json: Object | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # llama.cpp's.
    cache_prompt: bool = True

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def grammar_field(self) -> str:
        """Which field says what the completion has to obey."""
        return next((name for name in GUIDED if getattr(self, name) is not None), "response_format")

    def grammar(self) -> Grammar | None:
        """What the completion has to obey."""
        if self.grammar_field not in GUIDED:
            return None if self.response_format is None else self.response_format.grammar()
        given: Object | str | list[str] = getattr(self, self.grammar_field)
        if isinstance(given, dict):
            given = json.dumps(given)
        return Grammar(GUIDED[self.grammar_field], given if isinstance(given, str) else tuple(given))

    @property
    def names(self) -> dict[str, str]:
        """What fields of GenerationRequest are called in this body."""
        return {"stop_strings": "stop", "grammar": self.grammar_field, "adapter": "model", "request_id": "x-request-id"}

    def shared(self) -> dict[str, Any]:
        """The fields of GenerationRequest that both kinds fill alike."""
        return {
            "n": or_else(self.n, 1),
            "temperature": or_else(self.temperature, 1.0),
            "top_p": or_else(self.top_p, 1.0),
            "top_k": max(or_else(self.top_k, 0), 0),
            "min_p": or_else(self.min_p, 0.0),
            "typical_p": or_else(self.typical_p, 1.0),
            "repetition_penalty": or_else(self.repetition_penalty, 1.0),
            "presence_penalty": or_else(self.presence_penalty, 0.0),
            "frequency_penalty": or_else(self.frequency_penalty, 0.0),
            "seed": self.seed,
            "min_tokens": or_else(self.min_tokens, 0),
            "stop_strings": strings(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "include_stop_string": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "include_special_tokens": not self.skip_special_tokens,
            "priority": self.priority,
            "use_prefix_cache": self.cache_prompt,
        }


class ToolDefinition(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Object


class ChatBody(OpenAiBody):
    """POST /v1/chat/completions."""

    messages: list[Object]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None

    @property
    def demands_call(self) -> bool:
        """Whether the turn has to be a call of a tool."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def names(self) -> dict[str, str]:
        """A call that is demanded is a grammar too."""
        demanded = {"grammar": "tools"} if self.demands_call else {}
        return {**super().names, **demanded, "input": "messages", "logprobs": "top_logprobs"}

    @property
    def offered_tools(self) -> list[Object]:
        """The functions that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.model_dump() for tool in self.tools or ()]


class CompletionBody(OpenAiBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: None = None

    @property
    def names(self) -> dict[str, str]:
        """With the prompt's."""
        return {**super().names, "input": "prompt", "text": "prompt"}


def read_chat_body(body: ChatBody, model: ServingModel, limits: Limits, request_id: str) -> GenerationRequest:
    """Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    wrong, biases = _biases(body)
    wrong += message_violations("messages", body.messages)
    if body.top_logprobs is not None and not body.logprobs:
        wrong.append(FieldViolation("top_logprobs", "is set, but logprobs is not true"))
    forced, problem = _forced_call(body)
    wrong += problem
    tools = body.offered_tools if model.text.model.shows_tools else []
    if body.offered_tools and not tools and forced is None:
        untold = "are given, but this model's chat template has no place for them; demand a call with tool_choice"
        wrong.append(FieldViolation("tools", untold))
    prompt = ConversationInput(tuple(body.messages), tuple(tools))
    checked = GenerationRequest(
        prompt=prompt,
        request_id=request_id,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logit_bias=biases,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=forced or body.grammar(),
        adapter=model.adapter_of(body.model),
        **body.shared(),
    )
    return checked_request(checked, limits, wrong, body.names)


def read_completion_body(
    body: CompletionBody, model: ServingModel, limits: Limits, request_id: str
) -> list[GenerationRequest]:
    """One request a prompt. Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    wrong, biases = _biases(body)
    if body.best_of not in (None, body.n):
        wrong.append(FieldViolation("best_of", f"is {body.best_of}, allowed is n ({body.n})"))
    prompts = _prompts(body.prompt)
    if not prompts or any(not prompt for prompt in prompts):
        wrong.append(FieldViolation("prompt", "is empty; give at least one character or token id"))
    checked = []
    for index, prompt in enumerate(prompts or [()]):
        ids = () if isinstance(prompt, str) else tuple(prompt)
        wrong += token_id_violations("prompt", ids, limits)
        asked: Prompt = model.text.as_trained(prompt) if isinstance(prompt, str) else ids
        request = GenerationRequest(
            prompt=asked,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            max_tokens=or_else(body.max_tokens, DEFAULT_COMPLETION_TOKENS),
            logit_bias=biases,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=body.grammar(),
            adapter=model.adapter_of(body.model),
            **body.shared(),
        )
        checked.append(checked_request(request, limits, wrong, body.names))
    return checked


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def _biases(body: OpenAiBody) -> tuple[list[FieldViolation], dict[int, float]]:
    wrong, biases = [], {}
    for key, bias in (body.logit_bias or {}).items():
        if key.isdecimal() and len(key) < 10:
            biases[int(key)] = bias
        else:
            wrong.append(FieldViolation(f"logit_bias.{key[:20]}", "is no token id"))
    return wrong, biases


def _forced_call(body: ChatBody) -> tuple[Grammar | None, list[FieldViolation]]:
    """The grammar of a call that `tool_choice` demands, in Llama 3.1's way of writing calls."""
    if not body.demands_call:
        return None, []
    choice = body.tool_choice
    functions = [tool.function for tool in body.tools or ()]
    if isinstance(choice, dict):
        name = choice.get("function", {}).get("name") if isinstance(choice.get("function"), dict) else None
        functions = [function for function in functions if function.get("name") == name]
    if not functions:
        return None, [FieldViolation("tool_choice", "demands a call of a function that is not among tools")]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.get("name")},
                "parameters": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return Grammar("json_schema", json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})), []
