"""A conversation with a model: what the user says in, the answer's text out as it comes. No terminal here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llama31_core.commands.answers import Answer
from llama31_core.commands.prompts import PromptEncoder
from llama31_core.commands.sampling_options import parse_option
from llama31_core.errors import RequestError
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.lora.table import not_loaded

ONE_ANSWER = ("n", "num_beams")  # parameters that would make several


@dataclass
class ChatSession:
    """The dialog so far and how it goes on.

    Attributes:
        engine: computes; what it has in its cache of earlier turns is not computed again.
        encoder: holds the system message.
        options: sampling parameters, by name.
        stop: texts that end an answer.
        adapter: of the engine's, or None.
        messages: what user and assistant have said.
        num_prompt_tokens, num_cached_tokens, num_tokens: of all turns: given, of these found in the cache, generated.
    """

    engine: Engine
    encoder: PromptEncoder
    options: dict[str, Any]
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    num_turns: int = 0

    def reset(self) -> None:
        """Forget the dialog; the system message stays."""
        self.messages.clear()

    def set_option(self, assignment: str) -> None:
        """Set a sampling parameter, `name=value`.

        Raises:
            RequestError: no such parameter or value; nothing has changed then.
        """
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals:
            raise RequestError(f"{assignment!r} is not of the form name=value")
        if name in ONE_ANSWER:
            raise RequestError(f"{name} is 1 in a chat: there is one answer to each message")
        changed = {**self.options, name: parse_option(name, text.strip())}
        SamplingParams(**changed)
        self.options = changed

    def set_adapter(self, name: str | None) -> None:
        """Answer with an adapter, or with the base model alone.

        Raises:
            RequestError: it is not loaded.
        """
        loaded = [adapter.name for adapter in self.engine.adapters]
        if name is not None and name not in loaded:
            raise not_loaded(name, loaded)
        self.adapter = name

    def answer(self, text: str, is_stopped: Callable[[], bool]) -> Iterator[str]:
        """Say something; yields the answer piece by piece. Once `is_stopped` it ends, and what there is of it stays.

        Raises:
            RequestError: the dialog is longer than the context; the new message is taken back.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.encoder.encode_messages(messages)
        room = self.engine.max_seq_len - len(prompt)
        if room < 1:
            raise RequestError(
                f"the dialog has {len(prompt)} tokens, the context {self.engine.max_seq_len}; /reset, or say less"
            )
        wanted = self.options.get("max_tokens")
        params = SamplingParams(**{**self.options, "max_tokens": room if wanted is None else min(wanted, room)})
        before = self.engine.stats().num_prefix_hit_tokens
        self.engine.add("chat", prompt, params, adapter=self.adapter)
        answer = Answer(self.encoder.tokenizer, self.stop)
        try:
            yield from self._pieces(answer, is_stopped)
        finally:
            self.engine.abort("chat")
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self.num_turns += 1
            self.num_prompt_tokens += len(prompt)
            self.num_cached_tokens += self.engine.stats().num_prefix_hit_tokens - before
            self.num_tokens += len(answer.token_ids)

    def _pieces(self, answer: Answer, is_stopped: Callable[[], bool]) -> Iterator[str]:
        while answer.finish_reason is None and not is_stopped():
            for output in self.engine.step():
                if output.error is not None:
                    raise RequestError(f"the model could not go on: {output.error}")
                yield answer.push(output)
        if answer.finish_reason is None:
            yield answer.flush()

    def stats(self) -> str:
        """What the turns have cost, in one line."""
        share = self.num_cached_tokens / max(1, self.num_prompt_tokens)
        return (
            f"{self.num_turns} turns, {self.num_prompt_tokens} prompt tokens, {self.num_cached_tokens} of them "
            f"({share:.0%}) found in the cache, {self.num_tokens} generated"
        )
