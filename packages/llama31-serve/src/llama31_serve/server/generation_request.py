"""What any front (gRPC, HTTP) asks the generator for: one checked shape, and the checks that all of them share."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import Grammar
from llama31_serve.server.refusal import invalid

MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES, MAX_STOP_TOKEN_IDS = 16, 256, 64
MAX_REQUEST_ID_CHARACTERS, MAX_ROLE_CHARACTERS, MAX_ADAPTER_CHARACTERS = 128, 64, 128
MAX_N, MAX_LOGPROBS, MAX_BIASES, MAX_GRAMMAR_BYTES = 16, 20, 300, 64 * 1024
MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of this server and model. `max_new_tokens` None: what the context holds."""

    vocab_size: int
    max_seq_len: int
    default_max_tokens: int
    max_running: int
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    truncate_prompts: bool = False

    @property
    def max_n(self) -> int:
        """Most completions of one request."""
        return min(MAX_N, self.max_running)


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text to tokenise."""

    text: str
    add_bos: bool = False
    parse_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class ConversationInput:
    """Turns to write with the chat template, and the functions that the assistant may call."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


Prompt = TextInput | ConversationInput | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request for n completions of a prompt.

    Attributes:
        max_tokens: None for the server's default.
        clamp_max_tokens: take less than `max_tokens` if no more fits, instead of refusing.
        truncate_prompt_to: keep the last so many tokens of the prompt.
        logprobs: report the log-probability of each token and of so many likeliest ones.
        prompt_logprobs: the same for the prompt's tokens.
        priority: less is served earlier.
        adapter: LoRA adapter, None for the base model.
        deadline_s: end with what there is after so many seconds.
        use_prefix_cache: take what the cache has of the prompt's beginning, and leave this prompt's to others.
    """

    prompt: Prompt
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    clamp_max_tokens: bool = False
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_string: bool = False
    ignore_eos: bool = False
    n: int = 1
    include_special_tokens: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    adapter: str | None = None
    truncate_prompt_to: int | None = None
    deadline_s: float | None = None
    use_prefix_cache: bool = True


def require_valid(request: GenerationRequest, limits: Limits, found: Sequence[FieldViolation] = ()) -> None:
    """Raises Refusal (INVALID_ARGUMENT) with all wrong fields, those `found` by the front included."""
    wrong = [*found, *_violations(request, limits)]
    if wrong:
        raise invalid(wrong)


def seeded(request: GenerationRequest) -> GenerationRequest:
    """With a seed to tell the caller, if anything is drawn at all."""
    if request.temperature == 0 or request.seed is not None:
        return request
    return replace(request, seed=random.getrandbits(32))


def token_id_violations(name: str, token_ids: Sequence[int], limits: Limits) -> Iterator[FieldViolation]:
    """The first id that is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < limits.vocab_size)
        yield FieldViolation(f"{name}[{index}]", f"is {token_ids[index]}, allowed are 0 to {limits.vocab_size - 1}")


def message_violations(name: str, messages: Sequence[Mapping[str, Any]]) -> Iterator[FieldViolation]:
    """What is wrong with the roles of a conversation."""
    if not messages:
        yield FieldViolation(name, "is empty; give at least one message")
    for index, message in enumerate(messages):
        role = message.get("role")
        if not role:
            yield FieldViolation(f"{name}[{index}].role", "is empty; give system, user or assistant")
        elif not isinstance(role, str) or len(role) > MAX_ROLE_CHARACTERS or not role.isidentifier():
            yield FieldViolation(f"{name}[{index}].role", f"is {str(role)[:MAX_ROLE_CHARACTERS]!r}, not a role's name")


def _violations(request: GenerationRequest, limits: Limits) -> Iterator[FieldViolation]:
    request_id = request.request_id
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        yield FieldViolation("request_id", f"has {len(request_id)} characters, at most {MAX_REQUEST_ID_CHARACTERS}")
    elif not (request_id.isascii() and request_id.isprintable()):
        yield FieldViolation("request_id", "has characters other than printable ASCII")
    yield from _number_violations(request, limits)
    yield from _stop_violations(request, limits)
    yield from token_id_violations("logit_bias", tuple(request.logit_bias), limits)
    if len(request.logit_bias) > MAX_BIASES:
        yield FieldViolation("logit_bias", f"has {len(request.logit_bias)} entries, at most {MAX_BIASES}")
    if request.adapter is not None and not 0 < len(request.adapter) <= MAX_ADAPTER_CHARACTERS:
        yield FieldViolation("adapter", f"has {len(request.adapter)} characters, 1 to {MAX_ADAPTER_CHARACTERS}")
    if request.grammar is not None:
        texts = (request.grammar.source,) if isinstance(request.grammar.source, str) else request.grammar.source
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        if not 0 < size <= MAX_GRAMMAR_BYTES:
            yield FieldViolation("grammar", f"has {size} bytes, 1 to {MAX_GRAMMAR_BYTES}")


@dataclass(frozen=True, slots=True)
class _Range:
    """Allowed numbers: `low` to `high`, `low` itself not if `open_low`. `note` says what the ends mean."""

    low: float
    high: float = math.inf
    open_low: bool = False
    note: str = ""

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.open_low and value == self.low)

    def __str__(self) -> str:
        first = f"above {self.low:g}" if self.open_low else f"{self.low:g}"
        ends = f"{first} up" if self.high == math.inf else f"{first} to {self.high:g}"
        return f"{ends} ({self.note})" if self.note else ends


_RANGES = {
    "temperature": _Range(0, note="0 is greedy"),
    "top_p": _Range(0, 1, open_low=True, note="1 keeps all"),
    "top_k": _Range(0, 2**31, note="0 keeps all"),
    "min_p": _Range(0, 1, note="0 keeps all"),
    "typical_p": _Range(0, 1, open_low=True, note="1 keeps all"),
    "repetition_penalty": _Range(0, 100, open_low=True, note="1 is none"),
    "presence_penalty": _Range(-100, 100),
    "frequency_penalty": _Range(-100, 100),
    "seed": _Range(0, 2**64 - 1),
    "priority": _Range(-MAX_PRIORITY, MAX_PRIORITY),
    "logprobs": _Range(0, MAX_LOGPROBS),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS),
    "min_tokens": _Range(0, 2**31),
    "truncate_prompt_to": _Range(1, 2**31),
    "deadline_s": _Range(0, 86_400, open_low=True),
}


def _number_violations(request: GenerationRequest, limits: Limits) -> Iterator[FieldViolation]:
    ranges = _RANGES | {
        "n": _Range(1, limits.max_n),
        "max_tokens": _Range(1) if request.clamp_max_tokens else _Range(1, limits.max_seq_len, note="the context"),
    }
    for name, allowed in ranges.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            yield FieldViolation(name, f"is {value}, allowed are {allowed}")
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        yield FieldViolation("min_tokens", f"is {request.min_tokens}, more than max_tokens {request.max_tokens}")
    for token_id, bias in request.logit_bias.items():
        if not -100 <= bias <= 100:
            yield FieldViolation(f"logit_bias[{token_id}]", f"is {bias}, allowed are -100 to 100")


def _stop_violations(request: GenerationRequest, limits: Limits) -> Iterator[FieldViolation]:
    if len(request.stop_strings) > MAX_STOP_STRINGS:
        yield FieldViolation("stop_strings", f"has {len(request.stop_strings)}, at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(request.stop_strings[: MAX_STOP_STRINGS + 1]):
        size = len(stop.encode("utf-8", "replace"))
        if not stop:
            yield FieldViolation(f"stop_strings[{index}]", "is empty; it would stop at once")
        elif size > MAX_STOP_STRING_BYTES:
            yield FieldViolation(f"stop_strings[{index}]", f"has {size} bytes, at most {MAX_STOP_STRING_BYTES}")
    if len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield FieldViolation("stop_token_ids", f"has {len(request.stop_token_ids)}, at most {MAX_STOP_TOKEN_IDS}")
    yield from token_id_violations("stop_token_ids", request.stop_token_ids, limits)
