"""From what a user writes to the ids that the engine takes, and from the engine's ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama31_core.errors import RequestError
from llama31_core.inference.request import PromptLogprobs, StepOutput
from llama31_core.inference.sampling import TokenLogprobs
from llama31_tokenizer import ChatFormat, StreamDecoder, Tokenizer


@dataclass
class PromptEncoder:
    """How prompts are put to the model.

    Attributes:
        tokenizer: the model's.
        raw: complete a prompt as it is; otherwise it is what a user says in a dialog.
        add_bos_token: begin a raw prompt with the model's bos token.
        system: what the system says before a dialog that has no system message of its own.
    """

    tokenizer: Tokenizer
    raw: bool = False
    add_bos_token: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.raw and self.system is not None:
            raise RequestError("a raw prompt has no system message; leave out --system or --raw")
        if self.add_bos_token and not self.raw:
            raise RequestError("add_bos_token is for raw prompts, the chat format begins on its own; give --raw too")
        self._format = None if self.raw else ChatFormat(self.tokenizer)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt."""
        if self.raw:
            return self.tokenizer.encode(text, bos=self.add_bos_token)
        return self.encode_messages([{"role": "user", "content": text}])

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a dialog, up to the answer that is asked for."""
        if self._format is None:
            self._format = ChatFormat(self.tokenizer)
        has_system = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
        if self.system is not None and not has_system:
            messages = [{"role": "system", "content": self.system}, *messages]
        return self._format.encode_dialog(messages, add_generation_prompt=True).ids


@dataclass
class Answer:
    """One completion of a prompt, as far as the engine has given it; the fields are those of `Completion`."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    score: float | None = None


class AnswerCollector:
    """Puts together the completions of one request from the engine's steps."""

    def __init__(self, n: int) -> None:
        self.answers = [Answer() for _ in range(n)]
        self.prompt_logprobs: PromptLogprobs | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will come."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def push(self, output: StepOutput) -> None:
        """Take what a step gave."""
        answer = self.answers[output.index]
        answer.token_ids += output.token_ids
        answer.finish_reason, answer.error, answer.score = output.finish_reason, output.error, output.score
        if output.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs


def decode_answer(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of an answer, without control tokens."""
    decoder = StreamDecoder(tokenizer)
    return decoder.push(token_ids) + decoder.flush()
