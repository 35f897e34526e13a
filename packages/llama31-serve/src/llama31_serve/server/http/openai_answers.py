"""Pieces of OpenAI's answers that chat and completions share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama31_serve.server.engine import TokenLogprobs
from llama31_serve.server.generation import Generation
from llama31_serve.server.http.call import Call
from llama31_serve.server.job import FinishReason
from llama31_serve.server.text import TextWorker

REASONS: dict[FinishReason, str] = {
    "stop_token": "stop",
    "stop_string": "stop",
    "length": "length",
    "aborted": "aborted",
}
DONE = b"data: [DONE]\n\n"


@dataclass
class Frame:
    """What stands around the choices of an answer, or of one piece of it."""

    request_id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, call: Call, kind: str, model: str) -> Frame:
        """For a request that just came."""
        return cls(call.request_id or uuid.uuid4().hex, kind, model)

    def around(self, choices: Sequence[object], usage: object = None, kind: str | None = None) -> dict[str, Any]:
        """The object."""
        prefix = "chatcmpl" if self.kind.startswith("chat") else "cmpl"
        made = {
            "id": f"{prefix}-{self.request_id}",
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return made if usage is None else {**made, "usage": usage}


def usage_of(generations: Iterable[Generation]) -> dict[str, int]:
    """Tokens in and out."""
    prompt = completion = 0
    for generation in generations:
        prompt += generation.num_prompt_tokens
        completion += generation.num_tokens_made
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_logprobs(text: TextWorker, reports: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    """Log-probabilities as chat has them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = text.model.tokenizer.decode_bytes([token_id])
        return {"token": text.token_text(token_id), "logprob": logprob, "bytes": list(data)}

    return [
        {**entry(report.token_id, report.logprob), "top_logprobs": [entry(*one) for one in report.top]}
        for report in reports
    ]


class CompletionLogprobs:
    """Log-probabilities as completions have them: parallel lists, offsets counted on over the pieces of a stream."""

    def __init__(self, text: TextWorker) -> None:
        self._text_of = text.token_text
        self._offset = 0

    def of(self, prompt_ids: Sequence[int], reports: Iterable[TokenLogprobs | None]) -> dict[str, Any]:
        """The lists; `prompt_ids` name the tokens whose report is None."""
        tokens: list[str] = []
        offsets, values, tops = [], [], []
        for index, report in enumerate(reports):
            tokens.append(self._text_of(prompt_ids[index] if report is None else report.token_id))
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
            values.append(None if report is None else report.logprob)
            tops.append(None if report is None else {self._text_of(one): value for one, value in report.top})
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
