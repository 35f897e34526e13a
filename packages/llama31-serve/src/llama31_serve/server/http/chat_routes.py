"""POST /v1/chat/completions: streaming, tools, log-probabilities, several choices, usage."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from llama31_serve.server.engine import TokenLogprobs
from llama31_serve.server.generation import Generation
from llama31_serve.server.http.body import parse_body
from llama31_serve.server.http.call import Call
from llama31_serve.server.http.openai_answers import DONE, REASONS, Frame, chat_logprobs, usage_of
from llama31_serve.server.http.openai_bodies import ChatBody, read_chat_body
from llama31_serve.server.job import Update
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.serving_model import ModelHolder, ServingModel
from llama31_serve.server.text import ToolCall

CALLS_BEGIN_WITH = "{[<"


class ChatRoutes:
    """The handler."""

    def __init__(self, holder: ModelHolder) -> None:
        self._holder = holder

    async def chat(self, call: Call) -> None:
        """One conversation in, an assistant's turn out."""
        body = parse_body(ChatBody, call.body)
        model = self._holder.loaded()
        frame = Frame.of(call, "chat.completion", body.model)
        request = read_chat_body(body, model, model.generator.limits, frame.request_id)
        turns = [_Turn(model, body, index) for index in range(request.n)]
        try:
            async with model.generator.open(request) as generation:
                if body.stream:
                    await self._stream(call, body, frame, turns, generation)
                    return
                async for update in generation:
                    turns[update.completion_index].add(update)
        except Refusal as refusal:
            raise refusal.renamed(body.names) from None
        await call.answer(frame.around([turn.choice() for turn in turns], usage_of([generation])))

    async def _stream(
        self, call: Call, body: ChatBody, frame: Frame, turns: Sequence[_Turn], generation: Generation
    ) -> None:
        kind = "chat.completion.chunk"
        await call.begin_stream()
        for turn in turns:
            await call.event(frame.around([turn.piece({"role": "assistant", "content": ""})], kind=kind))
        async for update in generation:
            pieces = turns[update.completion_index].pieces(update)
            await call.events(frame.around([piece], kind=kind) for piece in pieces)
        if body.include_usage:
            await call.event(frame.around([], usage_of([generation]), kind=kind))
        await call.piece(DONE)


class _Turn:
    """One assistant's turn as it grows. Where functions are offered, text that may be a call is held back."""

    def __init__(self, model: ServingModel, body: ChatBody, index: int) -> None:
        self._text = model.text
        self._may_call = bool(body.offered_tools)
        self._wants_logprobs = bool(body.logprobs)
        self._index = index
        self._content = ""
        self._sent = 0
        self._reports: list[TokenLogprobs] = []
        self._reason: str | None = None

    def add(self, update: Update) -> None:
        """What was made since the last time."""
        self._content += update.text
        self._reports += update.logprobs
        if update.finished is not None:
            self._reason = REASONS[update.finished.reason]

    def choice(self) -> dict[str, Any]:
        """The whole turn."""
        calls = self._calls()
        message: dict[str, Any] = {"role": "assistant", "content": None if calls else self._content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(self._reports),
            "finish_reason": "tool_calls" if calls else self._reason,
        }

    def pieces(self, update: Update) -> list[dict[str, Any]]:
        """What a stream is sent of an update."""
        self.add(update)
        made = []
        calls = self._calls() if self._reason is not None else []
        if calls:
            delta = {"tool_calls": [{"index": number, **one} for number, one in enumerate(calls)]}
            made.append(self.piece(delta, self._logprobs(self._reports)))
        elif self._reason is not None or not self._may_be_a_call():
            text, self._sent = self._content[self._sent :], len(self._content)
            reports, self._reports = self._reports, []
            if text or reports:
                made.append(self.piece({"content": text}, self._logprobs(reports)))
        if self._reason is not None:
            made.append(self.piece({}, None, "tool_calls" if calls else self._reason))
        return made

    def piece(self, delta: object, logprobs: object = None, reason: str | None = None) -> dict[str, Any]:
        """One choice of a chunk."""
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _may_be_a_call(self) -> bool:
        begin = self._content.lstrip()[:1]
        return self._may_call and self._sent == 0 and (not begin or begin in CALLS_BEGIN_WITH)

    def _calls(self) -> list[dict[str, Any]]:
        if not self._may_call or self._sent:
            return []
        return [_as_json(found) for found in self._text.model.find_tool_calls(self._content)]

    def _logprobs(self, reports: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return {"content": chat_logprobs(self._text, reports), "refusal": None} if self._wants_logprobs else None


def _as_json(found: ToolCall) -> dict[str, Any]:
    function = {"name": found.name, "arguments": json.dumps(found.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
