"""What the clients return: plain frozen values, no protobuf."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llama31_serve.stubs import inference_pb2 as pb

FinishReason = Literal["stop_token", "stop_string", "length", "aborted", "unknown"]

_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP_TOKEN: "stop_token",
    pb.FINISH_REASON_STOP_STRING: "stop_string",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORTED: "aborted",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went in the server, in seconds."""

    queued_s: float
    first_token_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probability of a token (None for a prompt's first) and of the likeliest ones in its place."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion. `stop_string` is the one that was met, else empty; `logprobs` if they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished request of one or more completions. `text` and `finish_reason` are the first one's."""

    request_id: str
    completions: tuple[Completion, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.completions[0].finish_reason


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream: new text and new tokens of one completion. Either may be empty."""

    text: str
    token_ids: tuple[int, ...]
    completion_index: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What model a server serves and what its limits are."""

    model_name: str
    vocab_size: int
    max_seq_len: int
    default_max_tokens: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str
    server_version: str


def result_of_generate(response: pb.GenerateResponse) -> GenerateResult:
    """The answer of Generate."""
    completions = tuple(_completion(c.text, c) for c in response.completions)
    return _result(response, completions)


def result_of_chat(response: pb.ChatResponse) -> GenerateResult:
    """The answer of Chat."""
    completions = tuple(_completion(c.message.content, c) for c in response.completions)
    return _result(response, completions)


def model_info_of(response: pb.GetModelInfoResponse) -> ModelInfo:
    """The answer of GetModelInfo."""
    return ModelInfo(
        model_name=response.model_name,
        vocab_size=response.vocab_size,
        max_seq_len=response.max_seq_len,
        default_max_tokens=response.default_max_tokens,
        bos_token_id=response.bos_token_id if response.HasField("bos_token_id") else None,
        eos_token_ids=tuple(response.eos_token_ids),
        tokenizer_sha256=response.tokenizer_sha256,
        server_version=response.server_version,
    )


def usage_of(usage: pb.Usage) -> Usage:
    """Token counts."""
    return Usage(usage.prompt_tokens, usage.completion_tokens)


def timings_of(timings: pb.Timings) -> Timings:
    """Durations in seconds."""
    return Timings(
        timings.queued.ToNanoseconds() / 1e9,
        timings.first_token.ToNanoseconds() / 1e9,
        timings.decode.ToNanoseconds() / 1e9,
        timings.total.ToNanoseconds() / 1e9,
    )


def finish_reason_of(reason: int) -> FinishReason:
    """A reason by name; "unknown" for one that only newer servers give."""
    return _REASONS.get(reason, "unknown")


def logprobs_of(reports: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Reports on tokens."""
    return tuple(
        TokenLogprobs(
            report.token_id,
            report.logprob if report.HasField("logprob") else None,
            tuple((other.token_id, other.logprob) for other in report.top),
        )
        for report in reports
    )


def _completion(text: str, made: pb.Completion | pb.ChatCompletion) -> Completion:
    reason = finish_reason_of(made.finish.reason)
    return Completion(text, tuple(made.token_ids), reason, made.finish.stop_string, logprobs_of(made.logprobs))


def _result(response: pb.GenerateResponse | pb.ChatResponse, completions: tuple[Completion, ...]) -> GenerateResult:
    return GenerateResult(
        response.prompt.request_id,
        completions,
        usage_of(response.usage),
        timings_of(response.timings),
        logprobs_of(response.prompt_logprobs),
    )
