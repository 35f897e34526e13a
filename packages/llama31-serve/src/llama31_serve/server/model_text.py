"""llama31_tokenizer's vocabulary and chat format in the shape the server knows: the one module that imports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama31_serve.server.text import TextModel
from llama31_tokenizer import ChatFormat, StreamDecoder, Tokenizer, TokenizerError
from llama31_tokenizer.assistant import find_tool_calls

Mappings = Sequence[Mapping[str, Any]]
EncodeConversation = Callable[[Mappings, Mappings], list[int]]


def load_text(path: Path) -> TextModel:
    """The tokenizer and chat format of a model directory, or of a vocabulary file. Raises llama31_tokenizer's errors.

    A model without a chat format is served all the same; conversations are then refused, one by one.
    """
    tokenizer = Tokenizer.from_pretrained(path) if path.is_dir() else Tokenizer.from_file(path)

    def stream_decoder(skip_special_tokens: bool) -> StreamDecoder:
        return StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)

    adds_bos = tokenizer.vocabulary.controls.add_bos
    encode = _conversation_encoder(tokenizer)
    shows_tools = _shows_tools(encode)
    return TextModel(tokenizer, adds_bos, shows_tools, encode, find_tool_calls, stream_decoder, (TokenizerError,))


def _shows_tools(encode: EncodeConversation) -> bool:
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    question = [{"role": "user", "content": "q"}]
    try:
        return encode(question, [{"type": "function", "function": function}]) != encode(question, [])
    except TokenizerError:
        return False


def _conversation_encoder(tokenizer: Tokenizer) -> EncodeConversation:
    try:
        chat_format = ChatFormat(tokenizer)
    except TokenizerError as error:
        reason = str(error)

        def refuse(messages: Mappings, tools: Mappings) -> list[int]:
            raise TokenizerError(reason)

        return refuse

    def encode(messages: Mappings, tools: Mappings) -> list[int]:
        return list(chat_format.encode_dialog(messages, add_generation_prompt=True, tools=tools or None).ids)

    return encode
