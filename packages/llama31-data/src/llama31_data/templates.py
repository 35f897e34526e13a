"""Messages in, token ids and the exact ranges the assistant wrote out; `load_template` finds a template by its name.

Every template gives its ranges in tokens, from how the prompt was put together. None is found again by searching in
text, which is why an answer may hold anything: the template's separators, the text of a special token, nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama31_data.errors import DataError, RecordError
from llama31_data.samples import Encoded, Samples
from llama31_tokenizer import ChatFormat, Tokenizer
from llama31_tokenizer.errors import TokenizerError

CHAT = "chat"
LLAMA31 = "llama3.1"
_ROLES = ("system", "user", "assistant")
_ASSISTANT = _ROLES.index("assistant")


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

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format

    def encode(self, messages: Sequence[dict[str, str]]) -> Encoded:
        """See `Template.encode`."""
        try:
            dialog = self._format.encode_dialog(messages)
        except TokenizerError as error:
            raise RecordError(str(error)) from error
        return Encoded(dialog.ids, dialog.assistant_spans)


class HeaderTemplate(ChatTemplate):
    """Llama 3.1's header format, which can be written for many conversations of plain text at once.

    A turn does not depend on others. So what stands around its text is taken from the encoding of an empty turn, and
    all texts are tokenised in one call.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        super().__init__(chat_format)
        self._encode_many = chat_format.tokenizer.encode_many_to_numpy
        empty = [chat_format.encode_dialog([{"role": role, "content": ""}]).ids for role in _ROLES]
        self._end = empty[0][-1]
        # By role, first as the first turn of a conversation (begin-of-text, header), then as a later one (header).
        self._heads = [np.array(ids[cut:-1], np.int32) for cut in (0, 1) for ids in empty]
        self._number = {role: number for number, role in enumerate(_ROLES)}

    def encode_many(self, dialogs: Sequence[Sequence[dict[str, str]]]) -> Samples:
        """Ids and targets of conversations of one turn or more: those of `encode`, several times as fast."""
        turns = [turn for dialog in dialogs for turn in dialog]
        text_ids, text_lengths = self._encode_many([turn["content"] for turn in turns])
        roles = np.array([self._number[turn["role"]] for turn in turns], np.int64)
        dialog_turns = np.array([len(dialog) for dialog in dialogs], np.int64)
        first_turns = np.cumsum(dialog_turns) - dialog_turns
        heads = roles + len(_ROLES)
        heads[first_turns] -= len(_ROLES)

        head_lengths = np.array([len(head) for head in self._heads])[heads]
        lengths = head_lengths + text_lengths + 1
        starts = np.cumsum(lengths) - lengths
        text_starts = starts + head_lengths
        ends = text_starts + text_lengths
        is_answer = roles == _ASSISTANT

        tokens = np.empty(int(lengths.sum()), np.int32)
        trained = np.zeros(len(tokens), np.bool_)
        for number, head in enumerate(self._heads):
            tokens[starts[heads == number][:, None] + np.arange(len(head))] = head
        places = np.arange(len(text_ids)) + np.repeat(
            text_starts - (np.cumsum(text_lengths) - text_lengths), text_lengths
        )
        tokens[places] = text_ids
        tokens[ends] = self._end
        trained[places] = np.repeat(is_answer, text_lengths)
        trained[ends] = is_answer
        return Samples(tokens, trained, np.add.reduceat(lengths, first_turns).astype(np.int32))


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template called "chat" (the model's own), "llama3.1", or as fschat calls it ("vicuna_v1.1", …).

    Raises:
        DataError: unknown name, a vocabulary without the tokens it needs, or fschat not installed.
    """
    try:
        if name == CHAT:
            own = ChatFormat(tokenizer)
            return HeaderTemplate(own) if own.style == "llama3" else ChatTemplate(own)
        if name == LLAMA31:
            if "<|start_header_id|>" not in tokenizer.special_tokens:
                raise DataError(
                    "--template llama3.1: the vocabulary has no <|start_header_id|>, so it is not Llama 3's; "
                    "use --template chat for the model's own format"
                )
            return HeaderTemplate(ChatFormat(tokenizer, "llama3"))
    except TokenizerError as error:
        raise DataError(f"--template {name}: {error}") from error
    from llama31_data.fschat_template import FschatTemplate

    return FschatTemplate(name, tokenizer)
