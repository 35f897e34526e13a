"""Requests in, checked and plain Python values out; every wrong field of a request is named at once."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from llama31_serve.errors import FieldViolation
from llama31_serve.server.refusal import invalid
from llama31_serve.stubs import inference_pb2 as pb

MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES, MAX_STOP_TOKEN_IDS = 16, 256, 64
MAX_REQUEST_ID_CHARACTERS, MAX_ROLE_CHARACTERS = 128, 64
MAX_N = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of this server and model."""

    vocab_size: int
    max_seq_len: int
    default_max_tokens: int
    max_running: int

    @property
    def max_n(self) -> int:
        """Most completions of one request."""
        return min(MAX_N, self.max_running)


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text to tokenise."""

    text: str
    add_bos: bool
    parse_special_tokens: bool


@dataclass(frozen=True, slots=True)
class ConversationInput:
    """Turns to write with the chat template."""

    messages: tuple[dict[str, str], ...]


Prompt = TextInput | ConversationInput | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request of any of the four generating calls. `max_tokens` None: the server's default."""

    request_id: str
    prompt: Prompt
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    max_tokens: int | None
    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop_string: bool
    ignore_eos: bool
    n: int
    include_special_tokens: bool


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
        wrong += _token_id_violations("token_ids.ids", prompt, limits)
        if not prompt:
            wrong.append(FieldViolation("token_ids.ids", "is empty; give at least one token id"))
    elif kind == "conversation":
        prompt = read_messages(request.conversation.messages)
        wrong += message_violations("conversation.messages", request.conversation.messages)
    elif not wrong:
        wrong.append(FieldViolation("input", "is not set; give one of text, token_ids, conversation"))
    return _read_rest(request, prompt, wrong, limits)


def read_chat(request: pb.ChatRequest, limits: Limits) -> GenerationRequest:
    """Check a ChatRequest. Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    wrong = [*unknown_fields(request), *message_violations("messages", request.messages)]
    return _read_rest(request, read_messages(request.messages), wrong, limits)


def read_text(text: pb.TextPrompt) -> TextInput:
    """A TextPrompt as it is."""
    return TextInput(text.text, text.add_bos, text.parse_special_tokens)


def read_messages(messages: Iterable[pb.ChatMessage]) -> ConversationInput:
    """Messages as the chat format takes them."""
    return ConversationInput(tuple({"role": message.role, "content": message.content} for message in messages))


def message_violations(field: str, messages: Sequence[pb.ChatMessage]) -> Iterator[FieldViolation]:
    """What is wrong with a conversation."""
    if not messages:
        yield FieldViolation(field, "is empty; give at least one message")
    for index, message in enumerate(messages):
        if not message.role:
            yield FieldViolation(f"{field}[{index}].role", "is empty; give system, user or assistant")
        elif len(message.role) > MAX_ROLE_CHARACTERS or not message.role.isidentifier():
            yield FieldViolation(
                f"{field}[{index}].role", f"is {message.role[:MAX_ROLE_CHARACTERS]!r}, not a role's name"
            )


def token_ids_or_refuse(field: str, token_ids: Sequence[int], limits: Limits) -> None:
    """Raises Refusal (INVALID_ARGUMENT) unless every id is in the vocabulary."""
    wrong = list(_token_id_violations(field, token_ids, limits))
    if wrong:
        raise invalid(wrong)


def unknown_fields(message: Message, path: str = "") -> Iterator[FieldViolation]:
    """One violation for each field, at any depth, that this server's proto does not have."""
    for field in cast(Iterable[Any], UnknownFieldSet(message)):
        yield FieldViolation(f"{path}{field.field_number}", "is a field this server does not know; upgrade the server")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        if isinstance(value, Message):
            yield from unknown_fields(value, f"{path}{descriptor.name}.")
        else:
            for index, item in enumerate(value):
                yield from unknown_fields(item, f"{path}{descriptor.name}[{index}].")


def _read_rest(
    request: pb.GenerateRequest | pb.ChatRequest, prompt: Prompt, wrong: list[FieldViolation], limits: Limits
) -> GenerationRequest:
    sampling, stopping, output = request.sampling, request.stopping, request.output
    wrong += _request_id_violations(request.request_id)
    wrong += _sampling_violations(sampling)
    wrong += _stopping_violations(stopping, limits)
    if output.n > limits.max_n:
        wrong.append(FieldViolation("output.n", f"is {output.n}, allowed are at most {limits.max_n}"))
    if wrong:
        raise invalid(wrong)
    return GenerationRequest(
        request_id=request.request_id or uuid.uuid4().hex,
        prompt=prompt,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stop_strings=tuple(stopping.stop_strings),
        stop_token_ids=tuple(stopping.stop_token_ids),
        include_stop_string=stopping.include_stop_string,
        ignore_eos=stopping.ignore_eos,
        n=max(output.n, 1),
        include_special_tokens=output.include_special_tokens,
    )


def _request_id_violations(request_id: str) -> Iterator[FieldViolation]:
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        yield FieldViolation("request_id", f"has {len(request_id)} characters, at most {MAX_REQUEST_ID_CHARACTERS}")
    elif request_id and not (request_id.isascii() and request_id.isprintable()):
        yield FieldViolation("request_id", "has characters other than printable ASCII")


def _sampling_violations(sampling: pb.SamplingParams) -> Iterator[FieldViolation]:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        yield FieldViolation(
            "sampling.temperature", f"is {sampling.temperature}, allowed are numbers from 0 (greedy) up"
        )
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        yield FieldViolation("sampling.top_p", f"is {sampling.top_p}, allowed is above 0 up to 1 (1 keeps all)")


def _stopping_violations(stopping: pb.StoppingParams, limits: Limits) -> Iterator[FieldViolation]:
    if stopping.HasField("max_tokens") and not 1 <= stopping.max_tokens <= limits.max_seq_len:
        yield FieldViolation(
            "stopping.max_tokens", f"is {stopping.max_tokens}, allowed are 1 to {limits.max_seq_len} (the context)"
        )
    if len(stopping.stop_strings) > MAX_STOP_STRINGS:
        yield FieldViolation("stopping.stop_strings", f"has {len(stopping.stop_strings)}, at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(stopping.stop_strings[: MAX_STOP_STRINGS + 1]):
        if not stop:
            yield FieldViolation(f"stopping.stop_strings[{index}]", "is empty; it would stop at once")
        elif len(stop.encode()) > MAX_STOP_STRING_BYTES:
            yield FieldViolation(
                f"stopping.stop_strings[{index}]", f"has {len(stop.encode())} bytes, at most {MAX_STOP_STRING_BYTES}"
            )
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield FieldViolation(
            "stopping.stop_token_ids", f"has {len(stopping.stop_token_ids)}, at most {MAX_STOP_TOKEN_IDS}"
        )
    yield from _token_id_violations("stopping.stop_token_ids", stopping.stop_token_ids, limits)


def _token_id_violations(field: str, token_ids: Sequence[int], limits: Limits) -> Iterator[FieldViolation]:
    if token_ids and max(token_ids) >= limits.vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if token_id >= limits.vocab_size)
        yield FieldViolation(f"{field}[{index}]", f"is {token_ids[index]}, allowed are 0 to {limits.vocab_size - 1}")
