"""POST /v1/completions: one or more prompts, text or token ids, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama31_serve.server.engine import TokenLogprobs
from llama31_serve.server.generation import Generation
from llama31_serve.server.generation_request import GenerationRequest
from llama31_serve.server.http.body import parse_body
from llama31_serve.server.http.call import Call
from llama31_serve.server.http.openai_answers import DONE, REASONS, CompletionLogprobs, Frame, usage_of
from llama31_serve.server.http.openai_bodies import CompletionBody, read_completion_body
from llama31_serve.server.job import Update
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.serving_model import ModelHolder, ServingModel


class CompletionRoutes:
    """The handler."""

    def __init__(self, holder: ModelHolder) -> None:
        self._holder = holder

    async def complete(self, call: Call) -> None:
        """Prompts in, their continuations out; all of them run at once."""
        body = parse_body(CompletionBody, call.body)
        model = self._holder.loaded()
        frame = Frame.of(call, "text_completion", body.model)
        requests = read_completion_body(body, model, model.generator.limits, frame.request_id)
        work = [_Prompt(model, body, request, index) for index, request in enumerate(requests)]
        try:
            async with asyncio.TaskGroup() as group:
                for one in work:
                    group.create_task(one.run(call, frame))
        except* Refusal as refusals:
            first = refusals.exceptions[0]
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            assert isinstance(first, Refusal)
            raise first.renamed(body.names) from None
        usage = usage_of(one.generation for one in work if one.generation is not None)
        if not body.stream:
            await call.answer(frame.around([choice for one in work for choice in one.choices()], usage))
            return
        if body.include_usage:
            await call.event(frame.around([], usage))
        await call.piece(DONE)


class _Prompt:
    """One prompt and its n completions, which are the choices from `position * n` on."""

    def __init__(self, model: ServingModel, body: CompletionBody, request: GenerationRequest, position: int) -> None:
        self._model = model
        self._body = body
        self._request = request
        self._first = position * request.n
        self._logprobs = [CompletionLogprobs(model.text) for _ in range(request.n)]
        self._texts = [""] * request.n
        self._prompt_reports: Sequence[TokenLogprobs | None] = ()
        self._reports: list[list[TokenLogprobs]] = [[] for _ in range(request.n)]
        self._reasons: list[str | None] = [None] * request.n
        self._told_prompt = [False] * request.n
        self.generation: Generation | None = None

    async def run(self, call: Call, frame: Frame) -> None:
        """Generate; a stream is sent piece by piece."""
        async with self._model.generator.open(self._request) as self.generation:
            if self._body.stream and not call.streaming:
                await call.begin_stream()
            async for update in self.generation:
                index = update.completion_index
                self._prompt_reports = update.prompt_logprobs or self._prompt_reports
                if update.finished is not None:
                    self._reasons[index] = REASONS[update.finished.reason]
                if self._body.stream:
                    await call.event(frame.around([await self._piece(update)]))
                else:
                    self._texts[index] += update.text
                    self._reports[index] += update.logprobs
        if self._body.echo and not self._body.stream:
            prompt = await self._prompt_text()
            self._texts = [prompt + text for text in self._texts]

    def choices(self) -> list[dict[str, Any]]:
        """The whole continuations."""
        return [self._choice(index, text, self._reports[index]) for index, text in enumerate(self._texts)]

    async def _piece(self, update: Update) -> dict[str, Any]:
        index, text = update.completion_index, update.text
        if self._body.echo and not self._told_prompt[index]:
            text = await self._prompt_text() + text
        return self._choice(index, text, update.logprobs)

    def _choice(self, index: int, text: str, reports: Sequence[TokenLogprobs]) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            assert self.generation is not None
            first = self._prompt_reports if self._body.echo and not self._told_prompt[index] else ()
            logprobs = self._logprobs[index].of(self.generation.prompt_ids, [*first, *reports])
        self._told_prompt[index] = True
        reason = self._reasons[index]
        return {"index": self._first + index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def _prompt_text(self) -> str:
        prompt = self._request.prompt
        if isinstance(prompt, tuple):
            return await self._model.text.decode(prompt, include_special_tokens=True)
        text: str = getattr(prompt, "text", "")
        return text
