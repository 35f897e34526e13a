"""llama31.inference.v1's requests in, checked and plain Python values out; every wrong field is named at once."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import Grammar
from llama31_serve.server.generation_request import (
    ConversationInput,
    GenerationRequest,
    Limits,
    Prompt,
    TextInput,
    message_violations,
    require_valid,
    token_id_violations,
)
from llama31_serve.server.refusal import Refusal, invalid
from llama31_serve.stubs import inference_pb2 as pb

# What the fields of GenerationRequest are called in the .proto.
FIELD_NAMES = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed", "min_p", "typical_p", "repetition_penalty"), "sampling"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "logit_bias"), "sampling"),
    **dict.fromkeys(("max_tokens", "stop_strings", "stop_token_ids", "min_tokens"), "stopping"),
    **dict.fromkeys(("n", "logprobs", "prompt_logprobs"), "output"),
}
FIELD_NAMES = {name: f"{section}.{name}" for name, section in FIELD_NAMES.items()} | {"grammar": "structured_output"}


def read_generate(request: pb.GenerateRequest, limits: Limits) -> GenerationRequest:
    """Check a GenerateRequest. Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    kind = request.WhichOneof("input")
    wrong = list(unknown_fields(request))
    prompt: Prompt = ()
    if kind == "text":
        prompt = read_text(request.text)
        if not request.text.text:
            wrong.append(FieldViolation("text.text", "is empty; give at least one character"))
    elif kind == "token_ids":
        prompt = tuple(request.token_ids.ids)
        wrong += token_id_violations("token_ids.ids", prompt, limits)
        if not prompt:
            wrong.append(FieldViolation("token_ids.ids", "is empty; give at least one token id"))
    elif kind == "conversation":
        prompt = read_messages(request.conversation.messages)
        wrong += message_violations("conversation.messages", prompt.messages)
    elif not wrong:
        wrong.append(FieldViolation("input", "is not set; give one of text, token_ids, conversation"))
    return _read_rest(request, prompt, wrong, limits)


def read_chat(request: pb.ChatRequest, limits: Limits) -> GenerationRequest:
    """Check a ChatRequest. Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    prompt = read_messages(request.messages)
    wrong = [*unknown_fields(request), *message_violations("messages", prompt.messages)]
    return _read_rest(request, prompt, wrong, limits)


def read_text(text: pb.TextPrompt) -> TextInput:
    """A TextPrompt as it is."""
    return TextInput(text.text, text.add_bos, text.parse_special_tokens)


def read_messages(messages: Iterable[pb.ChatMessage]) -> ConversationInput:
    """Messages as the chat format takes them."""
    return ConversationInput(tuple({"role": message.role, "content": message.content} for message in messages))


def unknown_fields(message: Message, path: str = "") -> Iterator[FieldViolation]:
    """One violation for each field, at any depth, that this server's proto does not have."""
    for field in cast(Iterable[Any], UnknownFieldSet(message)):
        yield FieldViolation(f"{path}{field.field_number}", "is a field this server does not know; upgrade the server")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, Message):
            yield from unknown_fields(value, f"{path}{descriptor.name}.")
        else:
            for index, item in enumerate(value):
                yield from unknown_fields(item, f"{path}{descriptor.name}[{index}].")


def require_known_fields(message: Message) -> None:
    """Raises Refusal (INVALID_ARGUMENT) for fields that this server's proto does not have."""
    wrong = list(unknown_fields(message))
    if wrong:
        raise invalid(wrong)


def _read_rest(
    request: pb.GenerateRequest | pb.ChatRequest, prompt: Prompt, wrong: list[FieldViolation], limits: Limits
) -> GenerationRequest:
    sampling, stopping, output = request.sampling, request.stopping, request.output
    wrong += _grammar_violations(request)
    checked = GenerationRequest(
        prompt=prompt,
        request_id=request.request_id or uuid.uuid4().hex,
        temperature=_or(sampling, "temperature", 1.0),
        top_k=sampling.top_k,
        top_p=_or(sampling, "top_p", 1.0),
        min_p=sampling.min_p,
        typical_p=_or(sampling, "typical_p", 1.0),
        repetition_penalty=_or(sampling, "repetition_penalty", 1.0),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=_or(sampling, "seed", None),
        max_tokens=_or(stopping, "max_tokens", None),
        min_tokens=stopping.min_tokens,
        stop_strings=tuple(stopping.stop_strings),
        stop_token_ids=tuple(stopping.stop_token_ids),
        include_stop_string=stopping.include_stop_string,
        ignore_eos=stopping.ignore_eos,
        n=max(output.n, 1),
        include_special_tokens=output.include_special_tokens,
        logprobs=_or(output, "logprobs", None),
        prompt_logprobs=_or(output, "prompt_logprobs", None),
        grammar=_grammar(request.structured_output),
        priority=request.priority,
        adapter=request.adapter or None,
        use_prefix_cache=not request.bypass_prefix_cache,
    )
    try:
        require_valid(checked, limits, wrong)
    except Refusal as refusal:
        raise refusal.renamed(FIELD_NAMES) from None
    return checked


def _or(message: Message, name: str, default: Any) -> Any:
    return getattr(message, name) if message.HasField(name) else default


def _grammar(output: pb.StructuredOutput) -> Grammar | None:
    kind = output.WhichOneof("kind")
    if kind is None:
        return None
    return Grammar(kind, tuple(output.choice.texts) if kind == "choice" else getattr(output, kind))


def _grammar_violations(request: pb.GenerateRequest | pb.ChatRequest) -> Iterator[FieldViolation]:
    if request.HasField("structured_output") and request.structured_output.WhichOneof("kind") is None:
        yield FieldViolation("structured_output", "is empty; give json_schema, regex, lark or choice")
