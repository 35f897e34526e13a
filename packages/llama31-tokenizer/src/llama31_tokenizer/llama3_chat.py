"""Llama 3's header format: messages in, the ids Meta's own ChatFormat gives out.

Each turn is `<|start_header_id|>role<|end_header_id|>`, two newlines, the content and `<|eot_id|>`; role and content
are encoded on their own, so no text can reach over a control token (llama-models 0.3.0, `llama3/chat_format.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama31_tokenizer import llama3
from llama31_tokenizer.dialog import EncodedDialog, Span
from llama31_tokenizer.messages import Message, read_message
from llama31_tokenizer.tokenizer import Tokenizer
from llama31_tokenizer.tool_calls import format_tool_call


class Llama3Format:
    """Writes dialogs with Llama 3's control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._ids = tokenizer.special_tokens

    def encode_dialog(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> EncodedDialog:
        """Ids of a dialog, from `<|begin_of_text|>` on."""
        ids = [self._ids[llama3.BEGIN_OF_TEXT]]
        spans: list[Span] = []
        for index, raw in enumerate(messages):
            message = read_message(raw, index)
            ids += self._encode_header(message.role)
            start = len(ids)
            ids += self._encode_body(message)
            if message.role == "assistant":
                spans.append((start, len(ids)))
        if add_generation_prompt:
            ids += self._encode_header("assistant")
        return EncodedDialog(ids, lambda: spans)

    def _encode_header(self, role: str) -> list[int]:
        name = "ipython" if role == "tool" else role
        return [
            self._ids[llama3.START_HEADER],
            *self._encode(name),
            self._ids[llama3.END_HEADER],
            *self._encode("\n\n"),
        ]

    def _encode_body(self, message: Message) -> list[int]:
        ids: list[int] = []
        calls = message.tool_calls
        if calls and calls[0].is_builtin:
            ids.append(self._ids[llama3.PYTHON_TAG])
        for part in message.parts:
            ids += self._encode(part)
        for call in calls:
            ids += self._encode(format_tool_call(call))
        ids.append(self._ids[llama3.EOM if message.end_of_message else llama3.EOT])
        return ids
