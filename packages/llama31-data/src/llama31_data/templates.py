"""Messages in, token ids and the exact ranges the assistant wrote out; `load_template` finds a template by its name.

Every template gives its ranges in tokens, from how the prompt was put together. None is found again by searching in
text, which is why an answer may hold anything: the template's separators, the text of a special token, nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from llama31_data.errors import DataError, RecordError
from llama31_tokenizer import ChatFormat, Tokenizer
from llama31_tokenizer.errors import TokenizerError

CHAT = "chat"
LLAMA31 = "llama3.1"


class Encoded(NamedTuple):
    """One conversation: its ids and the [start, stop) ranges to train on, each end-of-turn included."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Template(Protocol):
    """How a conversation becomes tokens."""

    def encode(self, messages: Sequence[dict[str, str]]) -> Encoded:
        """Ids and trained ranges of a whole conversation.

        Raises:
            RecordError: this template cannot express the conversation.
        """
        ...


class ChatTemplate:
    """The model's own chat format: Llama 3.1 headers, or the Jinja template of its model directory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._format = ChatFormat(tokenizer)

    def encode(self, messages: Sequence[dict[str, str]]) -> Encoded:
        """See `Template.encode`."""
        try:
            dialog = self._format.encode_dialog(messages)
        except TokenizerError as error:
            raise RecordError(str(error)) from error
        return Encoded(dialog.ids, dialog.assistant_spans)


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template called "chat" (the model's own), "llama3.1", or as fschat calls it ("vicuna_v1.1", …).

    Raises:
        DataError: unknown name, a vocabulary without the tokens it needs, or fschat not installed.
    """
    try:
        if name == CHAT:
            return ChatTemplate(tokenizer)
        if name == LLAMA31:
            if "<|start_header_id|>" not in tokenizer.special_tokens:
                raise DataError(
                    "--template llama3.1: the vocabulary has no <|start_header_id|>, so it is not Llama 3's; "
                    "use --template chat for the model's own format"
                )
            return ChatTemplate(tokenizer)
    except TokenizerError as error:
        raise DataError(f"--template {name}: {error}") from error
    from llama31_data.fschat_template import FschatTemplate

    return FschatTemplate(name, tokenizer)
