"""Plain Python values to protobuf requests, the same for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from llama31_serve.stubs import inference_pb2 as pb

Message = Mapping[str, str]
"""One turn: {"role": "user", "content": "…"}."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation."""


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
    seed: int
    """Same seed, same request, same text."""
    stop: Sequence[str]
    """Strings that end the text; it is cut before them."""
    include_stop: bool
    """Keep the stop string in the text."""
    stop_token_ids: Sequence[int]
    """Tokens that end the text."""
    ignore_eos: bool
    """Go on after the model's own end tokens."""
    n: int
    """How many completions to make."""
    include_special_tokens: bool
    """Write control tokens into the answer's text."""
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
    )
    stopping = pb.StoppingParams(
        max_tokens=options.get("max_tokens"),
        stop_strings=options.get("stop", ()),
        stop_token_ids=options.get("stop_token_ids", ()),
        include_stop_string=options.get("include_stop", False),
        ignore_eos=options.get("ignore_eos", False),
    )
    output = pb.OutputOptions(
        n=options.get("n", 1), include_special_tokens=options.get("include_special_tokens", False)
    )
    return {"sampling": sampling, "stopping": stopping, "output": output}
