# ruff: noqa: N802  the methods are named in the .proto
"""fmaas.GenerationService: TGIS's interface over the same generator as everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import TokenLogprobs
from llama31_serve.server.fmaas_requests import FIELD_NAMES, Wanted, read_request, read_wanted
from llama31_serve.server.generation import Generation
from llama31_serve.server.generation_request import GenerationRequest, TextInput, seeded
from llama31_serve.server.job import Finished, Update
from llama31_serve.server.observer import Observer
from llama31_serve.server.refusal import Context, Refusal, Servicer, answers_refusals, invalid
from llama31_serve.server.serving_model import ModelHolder, ServingModel
from llama31_serve.server.validation import require_known_fields
from llama31_serve.stubs import generation_pb2 as pb
from llama31_serve.stubs.generation_pb2_grpc import GenerationServiceServicer

MAX_BATCH = 64


class FmaasService(Servicer, GenerationServiceServicer):
    """The servicer. One model is served, so `model_id` is not looked at; `prefix_id` is refused."""

    field_names = FIELD_NAMES

    def __init__(self, holder: ModelHolder, observer: Observer) -> None:
        super().__init__(observer)
        self._holder = holder

    @answers_refusals
    async def Generate(self, request: pb.BatchedGenerationRequest, context: Context) -> pb.BatchedGenerationResponse:
        model = self._holder.loaded()
        _require_no_prefix(request)
        if not 0 < len(request.requests) <= MAX_BATCH:
            raise invalid([FieldViolation("requests", f"has {len(request.requests)}, allowed are 1 to {MAX_BATCH}")])
        limits, params = model.generator.limits, request.params
        checked = [read_request(one, params, limits) for one in request.requests]
        wanted = read_wanted(params)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(model, one, wanted)) for one in checked]
        except* Refusal as refusals:
            raise refusals.exceptions[0] from None
        return pb.BatchedGenerationResponse(responses=[task.result() for task in tasks])

    @answers_refusals
    async def GenerateStream(self, request: pb.SingleGenerationRequest, context: Context) -> None:
        model = self._holder.loaded()
        _require_no_prefix(request)
        checked = seeded(read_request(request.request, request.params, model.generator.limits))
        wanted = read_wanted(request.params)
        async with model.generator.open(checked) as generation:
            first = pb.GenerationResponse(input_token_count=generation.num_prompt_tokens, seed=_seed(checked))
            first.text = _text(checked) if wanted.input_text else ""
            reporter = _Reporter(model, wanted)
            if wanted.input_tokens and checked.prompt_logprobs is None:
                first.input_tokens.extend(reporter.plain(generation.prompt_ids))
            await context.write(first)
            async for update in generation:
                message = pb.GenerationResponse(text=update.text, generated_token_count=generation.num_tokens_made)
                message.tokens.extend(reporter.generated(update))
                message.input_tokens.extend(reporter.prompt(generation, update))
                if update.finished is not None:
                    message.stop_reason = _stop_reason(model, generation, update.finished, checked)
                    message.generated_token_count = update.finished.completion_tokens
                await context.write(message)

    @answers_refusals
    async def Tokenize(self, request: pb.BatchedTokenizeRequest, context: Context) -> pb.BatchedTokenizeResponse:
        require_known_fields(request)
        text = self._holder.loaded().text
        response = pb.BatchedTokenizeResponse()
        for one in request.requests:
            ids = await text.encode(TextInput(one.text))
            tokens = [text.token_text(token_id) for token_id in ids] if request.return_tokens else []
            response.responses.add(token_count=len(ids), tokens=tokens)
        return response

    @answers_refusals
    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Context) -> pb.ModelInfoResponse:
        require_known_fields(request)
        limits = self._holder.loaded().generator.limits
        most = limits.max_seq_len - 1 if limits.max_new_tokens is None else limits.max_new_tokens
        kind = pb.ModelInfoResponse.DECODER_ONLY
        return pb.ModelInfoResponse(model_kind=kind, max_sequence_length=limits.max_seq_len, max_new_tokens=most)

    async def _one(self, model: ServingModel, checked: GenerationRequest, wanted: Wanted) -> pb.GenerationResponse:
        checked = seeded(checked)
        response = pb.GenerationResponse(seed=_seed(checked))
        pieces = [_text(checked)] if wanted.input_text else []
        reporter = _Reporter(model, wanted)
        async with model.generator.open(checked) as generation:
            response.input_token_count = generation.num_prompt_tokens
            if wanted.input_tokens and checked.prompt_logprobs is None:
                response.input_tokens.extend(reporter.plain(generation.prompt_ids))
            async for update in generation:
                pieces.append(update.text)
                response.tokens.extend(reporter.generated(update))
                response.input_tokens.extend(reporter.prompt(generation, update))
                if update.finished is not None:
                    response.stop_reason = _stop_reason(model, generation, update.finished, checked)
                    response.generated_token_count = update.finished.completion_tokens
        response.text = "".join(pieces)
        return response


class _Reporter:
    """Tokens to TGIS's TokenInfo."""

    def __init__(self, model: ServingModel, wanted: Wanted) -> None:
        self._text_of = model.text.token_text
        self._wanted = wanted

    def plain(self, token_ids: Iterable[int]) -> list[pb.TokenInfo]:
        """Texts alone."""
        return [pb.TokenInfo(text=self._text_of(token_id)) for token_id in token_ids]

    def generated(self, update: Update) -> list[pb.TokenInfo]:
        """The new tokens of an update, if they were asked for."""
        if not self._wanted.generated_tokens:
            return []
        return self._reports(update.logprobs) if update.logprobs else self.plain(update.token_ids)

    def prompt(self, generation: Generation, update: Update) -> list[pb.TokenInfo]:
        """The prompt's tokens, when their report has come; the first has no log-probability."""
        if update.prompt_logprobs is None:
            return []
        later = self._reports([report for report in update.prompt_logprobs if report is not None])
        return [*self.plain(generation.prompt_ids[:1]), *later]

    def _reports(self, reports: Iterable[TokenLogprobs]) -> list[pb.TokenInfo]:
        return [self._report(report) for report in reports]

    def _report(self, report: TokenLogprobs) -> pb.TokenInfo:
        info = pb.TokenInfo(text=self._text_of(report.token_id))
        if self._wanted.logprobs:
            info.logprob = report.logprob
        if self._wanted.ranks:
            ranks = [token_id for token_id, _ in report.top]
            info.rank = ranks.index(report.token_id) + 1 if report.token_id in ranks else len(ranks) + 1
        for token_id, logprob in report.top[: self._wanted.top_n]:
            shown = logprob if self._wanted.logprobs else 0.0
            info.top_tokens.add(text=self._text_of(token_id), logprob=shown)
        return info


def _require_no_prefix(request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest) -> None:
    require_known_fields(request)
    if request.HasField("prefix_id"):
        raise invalid([FieldViolation("prefix_id", "is set, but this server has no prompt prefixes; leave it out")])


def _seed(checked: GenerationRequest) -> int:
    return checked.seed or 0


def _text(checked: GenerationRequest) -> str:
    assert isinstance(checked.prompt, TextInput)
    return checked.prompt.text


def _stop_reason(
    model: ServingModel, generation: Generation, finished: Finished, checked: GenerationRequest
) -> pb.StopReason:
    if finished.reason == "stop_token":
        return pb.EOS_TOKEN
    if finished.reason == "stop_string":
        return pb.STOP_SEQUENCE
    if finished.reason == "aborted":
        return pb.TIME_LIMIT if generation.timed_out else pb.CANCELLED
    full = generation.num_prompt_tokens + finished.completion_tokens >= model.generator.limits.max_seq_len
    short = checked.max_tokens is not None and finished.completion_tokens < checked.max_tokens
    return pb.TOKEN_LIMIT if full or short else pb.MAX_TOKENS
