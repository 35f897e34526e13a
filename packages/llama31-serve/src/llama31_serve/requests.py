"""Plain Python values to protobuf requests, the same for both clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from llama31_serve.stubs import inference_pb2 as pb

Message = Mapping[str, str]
"""One turn: {"role": "user", "content": "…"}."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation."""


_UNSIGNED = {"max_tokens", "min_tokens", "top_k", "n", "logprobs", "prompt_logprobs"}
_UNSIGNED_MAX = 2**32 - 1


class Options(TypedDict, total=False):
    """Keywords of every generating call. What is left out is the server's choice."""

    max_tokens: int
    """Most tokens to generate per completion."""
    temperature: float
    """0 is greedy."""
    top_k: int
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float
    """Keep the likeliest tokens that add up to this probability."""
    min_p: float
    """Leave out tokens less likely than this share of the likeliest one."""
    typical_p: float
    """Keep the tokens nearest to the expected surprise, up to this probability."""
    repetition_penalty: float
    """Above 1 makes tokens that were there less likely."""
    presence_penalty: float
    """Taken once from the logit of each token of the completion."""
    frequency_penalty: float
    """Taken as often as the token is there."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids."""
    seed: int
    """Same seed, same request, same text."""
    stop: Sequence[str]
    """Strings that end the text; it is cut before them."""
    include_stop: bool
    """Keep the stop string in the text."""
    stop_token_ids: Sequence[int]
    """Tokens that end the text."""
    min_tokens: int
    """Tokens before which no end token is drawn."""
    ignore_eos: bool
    """Go on after the model's own end tokens."""
    n: int
    """How many completions to make."""
    include_special_tokens: bool
    """Write control tokens into the answer's text."""
    logprobs: int
    """Report the log-probability of each token and of so many likeliest ones."""
    prompt_logprobs: int
    """The same for the prompt's tokens."""
    json_schema: str | Mapping[str, Any]
    """The text is JSON that this schema accepts. One of json_schema, regex, lark and choice."""
    regex: str
    """The text matches this regular expression."""
    lark: str
    """The text obeys this grammar in Lark's notation."""
    choice: Sequence[str]
    """The text is one of these."""
    priority: int
    """Less is served earlier; 0 is ordinary."""
    adapter: str
    """LoRA adapter by the name it was loaded under."""
    bypass_prefix_cache: bool
    """Compute the whole prompt, and leave nothing of it for other requests to find."""
    request_id: str
    """To find the request in the server's log, or to abort it. The server makes one up if there is none."""


def build_generate(
    prompt: Prompt, options: Options, *, add_bos: bool = False, parse_special_tokens: bool = False
) -> pb.GenerateRequest:
    """A GenerateRequest. Raises TypeError for an option there is none of, or a prompt of none of the three kinds."""
    request = pb.GenerateRequest(request_id=_request_id(options), **_parameters(options))
    if isinstance(prompt, str):
        request.text.CopyFrom(_text(prompt, add_bos, parse_special_tokens))
    elif prompt and isinstance(prompt[0], Mapping):
        request.conversation.messages.extend(build_messages(prompt))  # type: ignore[arg-type]
    else:
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
        request.token_ids.SetInParent()
    return request


def build_chat(messages: Sequence[Message], options: Options) -> pb.ChatRequest:
    """A ChatRequest."""
    return pb.ChatRequest(request_id=_request_id(options), messages=build_messages(messages), **_parameters(options))


def build_tokenize(prompt: str | Sequence[Message], *, add_bos: bool, parse_special_tokens: bool) -> pb.TokenizeRequest:
    """A TokenizeRequest."""
    if isinstance(prompt, str):
        return pb.TokenizeRequest(text=_text(prompt, add_bos, parse_special_tokens))
    return pb.TokenizeRequest(conversation=pb.Conversation(messages=build_messages(prompt)))


def build_messages(messages: Sequence[Message]) -> list[pb.ChatMessage]:
    """Turns of a conversation. Raises ValueError for a turn with other keys than role and content."""
    return [pb.ChatMessage(**message) for message in messages]


def _text(text: str, add_bos: bool, parse_special_tokens: bool) -> pb.TextPrompt:
    return pb.TextPrompt(text=text, add_bos=add_bos, parse_special_tokens=parse_special_tokens)


def _request_id(options: Options) -> str:
    for name in _UNSIGNED & options.keys():
        value = options[name]  # type: ignore[literal-required]
        if not 0 <= value <= _UNSIGNED_MAX:
            raise ValueError(f"{name} is {value}, allowed are 0 to {_UNSIGNED_MAX}")
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(Options.__annotations__)}")
    return options.get("request_id", "")


def _parameters(options: Options) -> dict[str, Any]:
    sampling = pb.SamplingParams(
        temperature=options.get("temperature"),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p"),
        seed=options.get("seed"),
        min_p=options.get("min_p", 0.0),
        typical_p=options.get("typical_p"),
        repetition_penalty=options.get("repetition_penalty"),
        presence_penalty=options.get("presence_penalty", 0.0),
        frequency_penalty=options.get("frequency_penalty", 0.0),
        logit_bias=options.get("logit_bias", {}),
    )
    stopping = pb.StoppingParams(
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens", 0),
        stop_strings=options.get("stop", ()),
        stop_token_ids=options.get("stop_token_ids", ()),
        include_stop_string=options.get("include_stop", False),
        ignore_eos=options.get("ignore_eos", False),
    )
    output = pb.OutputOptions(
        n=options.get("n", 1),
        include_special_tokens=options.get("include_special_tokens", False),
        logprobs=options.get("logprobs"),
        prompt_logprobs=options.get("prompt_logprobs"),
    )
    return {
        "sampling": sampling,
        "stopping": stopping,
        "output": output,
        "structured_output": _structured_output(options),
        "priority": options.get("priority", 0),
        "adapter": options.get("adapter", ""),
        "bypass_prefix_cache": options.get("bypass_prefix_cache", False),
    }


def _structured_output(options: Options) -> pb.StructuredOutput | None:
    kinds = options.keys() & {"json_schema", "regex", "lark", "choice"}
    if not kinds:
        return None
    if len(kinds) > 1:
        raise TypeError(f"{' and '.join(sorted(kinds))} exclude each other; give one")
    if "json_schema" in options:
        schema = options["json_schema"]
        return pb.StructuredOutput(json_schema=schema if isinstance(schema, str) else json.dumps(schema))
    if "choice" in options:
        return pb.StructuredOutput(choice=pb.Choices(texts=options["choice"]))
    return pb.StructuredOutput(regex=options.get("regex"), lark=options.get("lark"))
