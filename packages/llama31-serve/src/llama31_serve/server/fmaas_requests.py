"""TGIS's requests in, the shared GenerationRequest out, with TGIS's defaults and limits.

Where the numbers come from: IBM's text-generation-inference, proto/generation.proto and its router's validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama31_serve.errors import FieldViolation
from llama31_serve.server.generation_request import GenerationRequest, Limits, TextInput, require_valid
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.validation import unknown_fields
from llama31_serve.stubs import generation_pb2 as pb

DEFAULT_MAX_NEW_TOKENS = 20
MAX_STOP_SEQUENCES, MAX_STOP_SEQUENCE_BYTES, MAX_TOP_N_TOKENS = 6, 240, 5
FIELD_NAMES = {
    "temperature": "params.sampling.temperature",
    "top_k": "params.sampling.top_k",
    "top_p": "params.sampling.top_p",
    "seed": "params.sampling.seed",
    "repetition_penalty": "params.decoding.repetition_penalty",
    "max_tokens": "params.stopping.max_new_tokens",
    "min_tokens": "params.stopping.min_new_tokens",
    "stop_strings": "params.stopping.stop_sequences",
    "deadline_s": "params.stopping.time_limit_millis",
    "input": "request.text",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What TGIS's response options ask for."""

    input_text: bool
    generated_tokens: bool
    input_tokens: bool
    logprobs: bool
    ranks: bool
    top_n: int


def read_wanted(params: pb.Parameters) -> Wanted:
    """The response options."""
    options = params.response
    return Wanted(
        options.input_text,
        options.generated_tokens,
        options.input_tokens,
        options.token_logprobs,
        options.token_ranks,
        options.top_n_tokens,
    )


def read_request(request: pb.GenerationRequest, params: pb.Parameters, limits: Limits) -> GenerationRequest:
    """One input with the parameters of its batch. Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    wrong = [*unknown_fields(request, "request."), *unknown_fields(params, "params."), *_violations(params)]
    if not request.text:
        wrong.append(FieldViolation("request.text", "is empty; give at least one character"))
    sampling, stopping, response = params.sampling, params.stopping, params.response
    sample = params.method == pb.SAMPLE
    reports = response.token_logprobs or response.token_ranks or response.top_n_tokens > 0
    top_n = max(response.top_n_tokens, 1 if response.token_ranks else 0)
    checked = GenerationRequest(
        prompt=TextInput(request.text),
        temperature=(sampling.temperature or 1.0) if sample else 0.0,
        top_k=sampling.top_k if sample else 0,
        top_p=(sampling.top_p or 1.0) if sample else 1.0,
        seed=sampling.seed if sample and sampling.HasField("seed") else None,
        repetition_penalty=params.decoding.repetition_penalty or 1.0,
        max_tokens=stopping.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        clamp_max_tokens=not stopping.max_new_tokens,
        min_tokens=stopping.min_new_tokens,
        stop_strings=tuple(stopping.stop_sequences),
        include_stop_string=True,
        logprobs=top_n if reports and response.generated_tokens else None,
        prompt_logprobs=top_n if reports and response.input_tokens else None,
        truncate_prompt_to=params.truncate_input_tokens or None,
        deadline_s=stopping.time_limit_millis / 1e3 if stopping.time_limit_millis else None,
    )
    try:
        require_valid(checked, limits, wrong)
    except Refusal as refusal:
        raise refusal.renamed(FIELD_NAMES) from None
    return checked


def _violations(params: pb.Parameters) -> Iterator[FieldViolation]:
    stops = params.stopping.stop_sequences
    if len(stops) > MAX_STOP_SEQUENCES:
        yield FieldViolation("params.stopping.stop_sequences", f"has {len(stops)}, at most {MAX_STOP_SEQUENCES}")
    for index, stop in enumerate(stops[:MAX_STOP_SEQUENCES]):
        if len(stop.encode()) > MAX_STOP_SEQUENCE_BYTES:
            problem = f"has {len(stop.encode())} bytes, at most {MAX_STOP_SEQUENCE_BYTES}"
            yield FieldViolation(f"params.stopping.stop_sequences[{index}]", problem)
    if params.response.top_n_tokens > MAX_TOP_N_TOKENS:
        problem = f"is {params.response.top_n_tokens}, at most {MAX_TOP_N_TOKENS}"
        yield FieldViolation("params.response.top_n_tokens", problem)
    if params.decoding.HasField("length_penalty"):
        yield FieldViolation("params.decoding.length_penalty", "is not supported; leave it out")
