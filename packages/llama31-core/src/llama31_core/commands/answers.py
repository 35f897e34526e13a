"""Completions of a request, put together from the engine's steps: token ids in, text out, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from llama31_core.inference.request import PromptLogprobs, StepOutput
from llama31_core.inference.sampling import TokenLogprobs
from llama31_tokenizer import StopStringMatcher, StreamDecoder, Tokenizer


class Answer:
    """One completion of a prompt, as far as the engine has given it; beside `text` the fields are those of
    `Completion`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprobs] | None = None
        self.error: str | None = None
        self.score: float | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopStringMatcher(stop)

    def push(self, output: StepOutput) -> str:
        """Take what a step gave; the text that is certain by now. The tokens end with that which completes a stop
        string, the text before it."""
        if self.finish_reason is not None:
            return ""
        count, piece = 0, ""
        for token in output.token_ids:
            count += 1
            piece += self._matcher.push(self._decoder.push(token))
            if self._matcher.matched is not None:
                break
        self.token_ids += output.token_ids[:count]
        self.text += piece
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs[:count]
        self.error, self.score = output.error, output.score
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        elif output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            piece += self.flush()
        return piece

    def flush(self) -> str:
        """The text that was held back, when nothing more will come."""
        rest = self._matcher.push(self._decoder.flush())
        rest += "" if self._matcher.matched is not None else self._matcher.flush()
        self.text += rest
        return rest


class AnswerCollector:
    """The completions of one request.

    Args:
        tokenizer: the model's.
        n: completions.
        stop: texts that end one.
    """

    def __init__(self, tokenizer: Tokenizer, n: int = 1, stop: Sequence[str] = ()) -> None:
        self.answers = [Answer(tokenizer, stop) for _ in range(n)]
        self.prompt_logprobs: PromptLogprobs | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is wanted; the engine may not have heard of a stop string yet."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def push(self, output: StepOutput) -> str:
        """Take what a step gave; the new text of the completion that it is of."""
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        return self.answers[output.index].push(output)


def decode_answer(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of an answer, without control tokens."""
    decoder = StreamDecoder(tokenizer)
    return decoder.push(token_ids) + decoder.flush()
