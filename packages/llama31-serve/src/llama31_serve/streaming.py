"""A stream's messages put together: chunks out as they come, the complete result at the end."""

from __future__ import annotations

from llama31_serve.results import (
    Chunk,
    Completion,
    GenerateResult,
    TokenLogprobs,
    finish_reason_of,
    logprobs_of,
    timings_of,
    usage_of,
)
from llama31_serve.stubs import inference_pb2 as pb


class StreamState:
    """Collects one stream for the iterators of Client and AsyncClient."""

    def __init__(self) -> None:
        self.request_id = ""
        self.prompt_tokens = 0
        self.result: GenerateResult | None = None
        self._texts: dict[int, list[str]] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[TokenLogprobs]] = {}
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._finishes: dict[int, pb.Finish] = {}

    def take(self, response: pb.GenerateStreamResponse | pb.ChatStreamResponse) -> Chunk | None:
        """The chunk in a message, None if it holds none."""
        event, index = response.WhichOneof("event"), response.completion_index
        if event == "prompt":
            self.request_id = response.prompt.request_id
            self.prompt_tokens = response.prompt.prompt_tokens
        elif event == "delta":
            logprobs = logprobs_of(response.delta.logprobs)
            chunk = Chunk(response.delta.text, tuple(response.delta.token_ids), index, logprobs)
            self._logprobs.setdefault(index, []).extend(logprobs)
            self._prompt_logprobs += logprobs_of(response.delta.prompt_logprobs)
            self._texts.setdefault(index, []).append(chunk.text)
            self._token_ids.setdefault(index, []).extend(chunk.token_ids)
            return chunk
        elif event == "finish":
            self._finishes[index] = response.finish.finish
            if response.finish.HasField("usage"):
                self.result = self._result(response.finish)
        return None

    def _result(self, last: pb.StreamFinish) -> GenerateResult:
        completions = tuple(
            Completion(
                "".join(self._texts.get(index, ())),
                tuple(self._token_ids.get(index, ())),
                finish_reason_of(self._finishes[index].reason),
                self._finishes[index].stop_string,
                tuple(self._logprobs.get(index, ())),
            )
            for index in sorted(self._finishes)
        )
        usage, timings = usage_of(last.usage), timings_of(last.timings)
        return GenerateResult(self.request_id, completions, usage, timings, self._prompt_logprobs)
