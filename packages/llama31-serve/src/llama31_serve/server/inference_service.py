# ruff: noqa: N802  the methods are named in the .proto
"""llama31.inference.v1.InferenceService: messages to and from the parts that do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import TokenLogprobs
from llama31_serve.server.generation import Generation
from llama31_serve.server.generation_request import GenerationRequest, message_violations, token_id_violations
from llama31_serve.server.job import Finished, FinishReason, Update
from llama31_serve.server.observer import Observer
from llama31_serve.server.refusal import Context, Servicer, answers_refusals, invalid
from llama31_serve.server.serving_model import ModelHolder
from llama31_serve.server.validation import (
    FIELD_NAMES,
    read_chat,
    read_generate,
    read_messages,
    read_text,
    require_known_fields,
    unknown_fields,
)
from llama31_serve.stubs import inference_pb2 as pb
from llama31_serve.stubs.inference_pb2_grpc import InferenceServiceServicer

_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop_token": pb.FINISH_REASON_STOP_TOKEN,
    "stop_string": pb.FINISH_REASON_STOP_STRING,
    "length": pb.FINISH_REASON_LENGTH,
    "aborted": pb.FINISH_REASON_ABORTED,
}


class InferenceService(Servicer, InferenceServiceServicer):
    """The servicer."""

    field_names = FIELD_NAMES

    def __init__(self, holder: ModelHolder, observer: Observer) -> None:
        super().__init__(observer)
        self._loaded = holder.loaded

    @answers_refusals
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        checked = read_generate(request, self._loaded().generator.limits)
        completions = [pb.Completion() for _ in range(checked.n)]
        response = pb.GenerateResponse()
        async with self._loaded().generator.open(checked) as generation:
            async for update in generation:
                completions[update.completion_index].text += update.text
                _collect(completions[update.completion_index], update)
                response.prompt_logprobs.extend(_logprobs(update.prompt_logprobs))
            _finish_response(response, generation)
        response.completions.extend(completions)
        return response

    @answers_refusals
    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        checked = read_chat(request, self._loaded().generator.limits)
        completions = [pb.ChatCompletion(message=pb.ChatMessage(role="assistant")) for _ in range(checked.n)]
        response = pb.ChatResponse()
        async with self._loaded().generator.open(checked) as generation:
            async for update in generation:
                completions[update.completion_index].message.content += update.text
                _collect(completions[update.completion_index], update)
                response.prompt_logprobs.extend(_logprobs(update.prompt_logprobs))
            _finish_response(response, generation)
        response.completions.extend(completions)
        return response

    @answers_refusals
    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> None:
        checked = read_generate(request.request, self._loaded().generator.limits)
        await self._stream(checked, pb.GenerateStreamResponse, context)

    @answers_refusals
    async def ChatStream(self, request: pb.ChatStreamRequest, context: Context) -> None:
        checked = read_chat(request.request, self._loaded().generator.limits)
        await self._stream(checked, pb.ChatStreamResponse, context)

    @answers_refusals
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        wrong = list(unknown_fields(request))
        kind = request.WhichOneof("input")
        if kind == "conversation":
            messages = read_messages(request.conversation.messages).messages
            wrong += message_violations("conversation.messages", messages)
        elif kind is None and not wrong:
            wrong.append(FieldViolation("input", "is not set; give one of text, conversation"))
        if wrong:
            raise invalid(wrong)
        prompt = read_text(request.text) if kind == "text" else read_messages(request.conversation.messages)
        return pb.TokenizeResponse(token_ids=await self._loaded().text.encode(prompt))

    @answers_refusals
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        require_known_fields(request)
        model = self._loaded()
        wrong = list(token_id_violations("token_ids", request.token_ids, model.generator.limits))
        if wrong:
            raise invalid(wrong)
        text = await model.text.decode(request.token_ids, include_special_tokens=request.include_special_tokens)
        return pb.DetokenizeResponse(text=text)

    @answers_refusals
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return self._loaded().info

    async def _stream(self, checked: GenerationRequest, response_type: Any, context: Context) -> None:
        # Written with context.write, not yielded: a cancelled call then raises here, where the generation is closed.
        async with self._loaded().generator.open(checked) as generation:
            prompt = pb.PromptInfo(request_id=generation.request_id, prompt_tokens=generation.num_prompt_tokens)
            await context.write(response_type(prompt=prompt))
            async for update in generation:
                index = update.completion_index
                text = update.text
                if text or update.token_ids or update.prompt_logprobs:
                    delta = pb.Delta(text=text, token_ids=update.token_ids, logprobs=_logprobs(update.logprobs))
                    delta.prompt_logprobs.extend(_logprobs(update.prompt_logprobs))
                    await context.write(response_type(completion_index=index, delta=delta))
                if update.finished is not None:
                    finish = pb.StreamFinish(finish=_finish(update.finished))
                    if not generation.unfinished:
                        finish.usage.CopyFrom(_usage(generation))
                        finish.timings.CopyFrom(_timings(generation))
                    await context.write(response_type(completion_index=index, finish=finish))


def _collect(completion: pb.Completion | pb.ChatCompletion, update: Update) -> None:
    completion.token_ids.extend(update.token_ids)
    completion.logprobs.extend(_logprobs(update.logprobs))
    if update.finished is not None:
        completion.finish.CopyFrom(_finish(update.finished))


def _logprobs(reports: Sequence[TokenLogprobs | None] | None) -> list[pb.TokenLogprobs]:
    made = []
    for report in reports or ():
        if report is None:  # the first token of a prompt
            made.append(pb.TokenLogprobs())
            continue
        top = [pb.Alternative(token_id=token_id, logprob=logprob) for token_id, logprob in report.top]
        made.append(pb.TokenLogprobs(token_id=report.token_id, logprob=report.logprob, top=top))
    return made


def _finish_response(response: pb.GenerateResponse | pb.ChatResponse, generation: Generation) -> None:
    response.prompt.request_id = generation.request_id
    response.prompt.prompt_tokens = generation.num_prompt_tokens
    response.usage.CopyFrom(_usage(generation))
    response.timings.CopyFrom(_timings(generation))


def _finish(finished: Finished) -> pb.Finish:
    return pb.Finish(
        reason=_REASONS[finished.reason],
        stop_string=finished.stop_string,
        completion_tokens=finished.completion_tokens,
    )


def _usage(generation: Generation) -> pb.Usage:
    return pb.Usage(prompt_tokens=generation.num_prompt_tokens, completion_tokens=generation.num_completion_tokens)


def _timings(generation: Generation) -> pb.Timings:
    durations = generation.durations()
    return pb.Timings(
        queued=_duration(durations.queued_s),
        first_token=_duration(durations.first_token_s),
        decode=_duration(durations.decode_s),
        total=_duration(durations.total_s),
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration
