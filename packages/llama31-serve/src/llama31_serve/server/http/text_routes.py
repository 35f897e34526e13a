"""POST /, /generate, /generate_stream and /infer: what TGI, vLLM and MindIE answer, from one generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from llama31_serve.server.engine import TokenLogprobs
from llama31_serve.server.generation import Generation
from llama31_serve.server.generation_request import GenerationRequest, seeded
from llama31_serve.server.http.body import has_field, parse_body
from llama31_serve.server.http.call import Call, encode_json
from llama31_serve.server.http.text_bodies import (
    PROMPT_NAMES,
    TEXT_NAMES,
    PromptBody,
    TextBody,
    read_prompt_body,
    read_text_body,
)
from llama31_serve.server.job import Finished, FinishReason, Update
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.serving_model import ModelHolder, ServingModel

_REASONS: dict[FinishReason, str] = {
    "stop_token": "eos_token",
    "stop_string": "stop_sequence",
    "length": "length",
    "aborted": "aborted",
}
NUL = b"\0"  # ends each answer of vLLM's stream


class TextRoutes:
    """The handlers."""

    def __init__(self, holder: ModelHolder) -> None:
        self._holder = holder

    async def root(self, call: Call) -> None:
        """TGI's POST /: /generate or /generate_stream, and the whole answer in a list."""
        body = parse_body(TextBody, call.body)
        await self._text(call, body, stream=body.stream, in_list=True)

    async def generate(self, call: Call) -> None:
        """TGI's and vLLM's POST /generate."""
        if has_field(call.body, "prompt"):
            await self._prompt(call)
            return
        body = parse_body(TextBody, call.body)
        await self._text(call, body, stream=body.stream)

    async def generate_stream(self, call: Call) -> None:
        """TGI's POST /generate_stream."""
        await self._text(call, parse_body(TextBody, call.body), stream=True)

    async def infer(self, call: Call) -> None:
        """MindIE's POST /infer."""
        body = parse_body(TextBody, call.body)
        if body.stream:
            await self._infer_stream(call, body)
        else:
            await self._text(call, body, stream=False)

    async def _text(self, call: Call, body: TextBody, *, stream: bool, in_list: bool = False) -> None:
        model = self._holder.loaded()
        request = seeded(read_text_body(body, model.text, model.generator.limits, call.request_id))
        answer = _TextAnswer(model, body, request)
        try:
            async with model.generator.open(request) as generation:
                if stream:
                    await call.begin_stream()
                async for update in generation:
                    answer.add(update)
                    if stream:
                        await call.events(answer.events(update, generation))
                _require_in_time(generation)
        except Refusal as refusal:
            raise refusal.renamed(TEXT_NAMES) from None
        if not stream:
            whole = answer.whole(generation)
            await call.answer([whole] if in_list else whole)

    async def _infer_stream(self, call: Call, body: TextBody) -> None:
        model = self._holder.loaded()
        request = seeded(read_text_body(body, model.text, model.generator.limits, call.request_id))
        answer = _TextAnswer(model, body, request)
        clock_s: float | None = None
        try:
            async with model.generator.open(request) as generation:
                await call.begin_stream()
                async for update in generation:
                    answer.add(update)
                    now_s = generation.durations().total_s
                    name = "prefill_time" if clock_s is None else "decode_time"
                    spent_ms = round((now_s - (clock_s or 0.0)) * 1e3, 2)
                    clock_s = now_s
                    event = {"prefill_time": None, "decode_time": None, name: spent_ms}
                    if update.finished is not None:
                        event |= answer.whole(generation)
                    await call.event({**event, "token": {"id": update.token_ids, "text": update.text}})
                _require_in_time(generation)
        except Refusal as refusal:
            raise refusal.renamed(TEXT_NAMES) from None

    async def _prompt(self, call: Call) -> None:
        body = parse_body(PromptBody, call.body)
        model = self._holder.loaded()
        adapter = None if body.model in (None, "None") else model.adapter_of(body.model)
        request = read_prompt_body(body, model.text, model.generator.limits, call.request_id, adapter)
        texts = [body.prompt] * request.n
        try:
            async with model.generator.open(request) as generation:
                if body.stream:
                    await call.begin_stream("application/octet-stream")
                async for update in generation:
                    texts[update.completion_index] += update.text
                    if body.stream:
                        await call.piece(_vllm(texts) + NUL)
        except Refusal as refusal:
            raise refusal.renamed(PROMPT_NAMES) from None
        if not body.stream:
            await call.answer({"text": texts})


class _TextAnswer:
    """TGI's answer as it grows."""

    def __init__(self, model: ServingModel, body: TextBody, request: GenerationRequest) -> None:
        self._text_of = model.text.token_text
        self._special = frozenset(model.text.model.tokenizer.special_tokens.values())
        self._parameters = body.parameters
        self._request = request
        self._pieces = [body.inputs] if body.parameters.return_full_text else []
        self._tokens: list[dict[str, Any]] = []
        self._top: list[list[dict[str, Any]]] = []
        self._prefill: list[dict[str, Any]] = []
        self._finished: Finished | None = None

    def add(self, update: Update) -> None:
        """One update of the only completion."""
        self._pieces.append(update.text)
        if self._parameters.details:
            self._tokens += self._described(update)
            self._top += [self._likeliest(report) for report in update.logprobs]
        for report in update.prompt_logprobs or ():
            self._prefill.append({"id": None, "text": None, "logprob": None} if report is None else self._token(report))
        self._finished = update.finished or self._finished

    def events(self, update: Update, generation: Generation) -> list[dict[str, Any]]:
        """One event for each token, as TGI sends them; the last has the whole text and the details."""
        described = self._described(update)
        pieces = list(update.pieces)
        if not described and update.finished is not None:  # a stop token ends a completion and is none of its own
            described, pieces = [{"id": None, "text": "", "logprob": None, "special": True}], [""]
        if described:
            pieces[-1] += update.tail
        made: list[dict[str, Any]] = [
            {"token": {**token, "text": piece}, "generated_text": None, "details": None}
            for token, piece in zip(described, pieces, strict=True)
        ]
        if update.finished is not None:
            made[-1] |= {"generated_text": "".join(self._pieces), "details": self._details(generation, brief=True)}
        return made

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer without a stream."""
        answer: dict[str, Any] = {"generated_text": "".join(self._pieces)}
        if self._parameters.details or self._parameters.decoder_input_details:
            answer["details"] = self._details(generation)
        return answer

    def _details(self, generation: Generation, *, brief: bool = False) -> dict[str, Any]:
        assert self._finished is not None
        details: dict[str, Any] = {
            "finish_reason": _REASONS[self._finished.reason],
            "generated_tokens": self._finished.completion_tokens,
            "seed": self._request.seed,
        }
        if not brief:
            if self._prefill:
                first = generation.prompt_ids[0]
                self._prefill[0] = {"id": first, "text": self._text_of(first), "logprob": None}
            details |= {"prefill": self._prefill, "tokens": self._tokens}
            if self._parameters.top_n_tokens:
                details["top_tokens"] = self._top
        return details

    def _described(self, update: Update) -> list[dict[str, Any]]:
        reports: Sequence[TokenLogprobs | None] = update.logprobs or [None] * len(update.token_ids)
        return [
            {
                "id": token_id,
                "text": self._text_of(token_id),
                "logprob": None if report is None else report.logprob,
                "special": token_id in self._special,
            }
            for token_id, report in zip(update.token_ids, reports, strict=True)
        ]

    def _likeliest(self, report: TokenLogprobs) -> list[dict[str, Any]]:
        return [
            {"id": token_id, "text": self._text_of(token_id), "logprob": logprob, "special": token_id in self._special}
            for token_id, logprob in report.top
        ]

    def _token(self, report: TokenLogprobs) -> dict[str, Any]:
        return {"id": report.token_id, "text": self._text_of(report.token_id), "logprob": report.logprob}


def _require_in_time(generation: Generation) -> None:
    if generation.timed_out:
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "parameters.timeout passed before the answer was complete")


def _vllm(texts: list[str]) -> bytes:
    return encode_json({"text": texts})
