"""Text to tokens and back for the handlers, in worker threads so that the event loop never waits for a long prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import Grammar, RequestRejectedError, StreamDecoder, Tokenizer
from llama31_serve.server.generation_request import ConversationInput, Prompt, TextInput
from llama31_serve.server.refusal import Refusal, invalid


class ToolCall(Protocol):
    """A function that an assistant calls."""

    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class TextModel:
    """The model's way with text.

    Attributes:
        tokenizer: vocabulary.
        adds_bos: whether the vocabulary's own way is to begin a text with the beginning-of-sequence token.
        shows_tools: whether the chat format tells the model of the functions that it may call.
        encode_conversation: messages and the functions they may call to ids, opened for the assistant.
        find_tool_calls: the calls that an assistant's text consists of, none if it is anything else.
        stream_decoder: makes a decoder; the argument says whether control tokens are left out.
        errors: what these raise when the caller's text, ids or conversation is at fault.
    """

    tokenizer: Tokenizer
    adds_bos: bool
    shows_tools: bool
    encode_conversation: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], list[int]]
    find_tool_calls: Callable[[str], Sequence[ToolCall]]
    stream_decoder: Callable[[bool], StreamDecoder]
    errors: tuple[type[Exception], ...]


class TextWorker:
    """Runs a TextModel in a few threads."""

    def __init__(
        self,
        model: TextModel,
        compile_grammar: Callable[[Grammar, Tokenizer], object],
        *,
        allow_special_tokens: bool,
        num_threads: int = 2,
    ) -> None:
        self.model = model
        self._compile_grammar = compile_grammar
        self._allow_special_tokens = allow_special_tokens
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="llama31-tokenizer")

    def close(self) -> None:
        """End the threads after what they are doing."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def as_trained(self, text: str) -> TextInput:
        """A text as HTTP's callers mean it: begun as the vocabulary says, its control tokens read where allowed."""
        special = self.model.tokenizer.special_tokens
        begun = self._allow_special_tokens and text.startswith(
            tuple(name for name, token_id in special.items() if token_id == self.model.tokenizer.bos_id)
        )
        return TextInput(text, self.model.adds_bos and not begun, self._allow_special_tokens)

    async def encode(self, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt. Raises Refusal if control tokens are not allowed, or the chat template refuses."""
        if isinstance(prompt, tuple):
            return prompt
        if isinstance(prompt, TextInput) and prompt.parse_special_tokens and not self._allow_special_tokens:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "text.parse_special_tokens: this server reads control tokens in text as plain characters; "
                "send token_ids or a conversation, or start the server with --allow_special_tokens",
            )
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, prompt)

    async def decode(self, token_ids: Sequence[int], *, include_special_tokens: bool) -> str:
        """Text of token ids. Raises Refusal for an id that no token has."""

        def decode() -> str:
            try:
                return self.model.tokenizer.decode(token_ids, skip_special_tokens=not include_special_tokens)
            except self.model.errors as error:
                raise invalid([FieldViolation("token_ids", str(error))]) from error

        return await asyncio.get_running_loop().run_in_executor(self._pool, decode)

    async def split(self, text: str) -> tuple[int, list[str]]:
        """How many tokens a text has, and their texts; those that are part of a character only are put together."""

        def split() -> tuple[int, list[str]]:
            ids = self._encode(TextInput(text, parse_special_tokens=self._allow_special_tokens))
            decoder = self.model.stream_decoder(False)
            pieces = [*(decoder.push((token_id,)) for token_id in ids), decoder.flush()]
            return len(ids), [piece for piece in pieces if piece]

        return await asyncio.get_running_loop().run_in_executor(self._pool, split)

    def token_text(self, token_id: int) -> str:
        """One token as it is shown by itself, control tokens included."""
        return self.model.tokenizer.decode([token_id])

    async def compile_grammar(self, grammar: Grammar) -> object:
        """The engine's mask for a grammar. Raises Refusal for one that is none, or that the engine can't follow."""

        def compile_() -> object:
            try:
                return self._compile_grammar(grammar, self.model.tokenizer)
            except RequestRejectedError as error:
                raise invalid([FieldViolation("grammar", str(error))]) from error

        return await asyncio.get_running_loop().run_in_executor(self._pool, compile_)

    def _encode(self, prompt: TextInput | ConversationInput) -> list[int]:
        try:
            if isinstance(prompt, ConversationInput):
                return self.model.encode_conversation(prompt.messages, prompt.tools)
            allowed: AbstractSet[str] | Literal["all"] = "all" if prompt.parse_special_tokens else frozenset()
            return self.model.tokenizer.encode(prompt.text, bos=prompt.add_bos, allowed_special=allowed)
        except self.model.errors as error:
            field = "messages" if isinstance(prompt, ConversationInput) else "text"
            raise invalid([FieldViolation(field, str(error))]) from error
