"""llama31_tokenizer's vocabulary and chat format in the shape the server knows: the one module that imports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llama31_serve.server.text import TextModel
from llama31_tokenizer import ChatFormat, StreamDecoder, Tokenizer, TokenizerError

EncodeConversation = Callable[[Sequence[Mapping[str, str]]], list[int]]


def load_text(model_dir: Path) -> TextModel:
    """The tokenizer and chat format of a model directory. Raises llama31_tokenizer's errors.

    A model without a chat format is served all the same; conversations are then refused, one by one.
    """
    tokenizer = Tokenizer.from_pretrained(model_dir)

    def stream_decoder(skip_special_tokens: bool) -> StreamDecoder:
        return StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)

    return TextModel(tokenizer, _conversation_encoder(tokenizer), stream_decoder, (TokenizerError,))


def _conversation_encoder(tokenizer: Tokenizer) -> EncodeConversation:
    try:
        chat_format = ChatFormat(tokenizer)
    except TokenizerError as error:
        reason = str(error)

        def refuse(messages: Sequence[Mapping[str, str]]) -> list[int]:
            raise TokenizerError(reason)

        return refuse

    def encode(messages: Sequence[Mapping[str, str]]) -> list[int]:
        return list(chat_format.encode_dialog(messages, add_generation_prompt=True).ids)

    return encode
