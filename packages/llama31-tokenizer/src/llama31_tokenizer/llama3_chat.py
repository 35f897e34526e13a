"""Llama 3's header format: messages in, ids and the assistant's spans out.

Each turn is `<|start_header_id|>role<|end_header_id|>`, two newlines, the content and `<|eot_id|>`; role and content
are encoded on their own, so no text can reach over a control token. Without tools and dates the ids are those of Meta's
ChatFormat (llama-models 0.3.0, `llama3/chat_format.py`), but for one point: a call of brave_search, wolfram_alpha or
photogen gets the `<|python_tag|>` that Meta's model card and prompt guide show and that class leaves out. With tools or
dates the system and user texts are those of the chat template published with Llama 3.1 Instruct.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama31_tokenizer import llama3
from llama31_tokenizer.dialog import EncodedDialog, Span
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.messages import Message, read_message
from llama31_tokenizer.tokenizer import Tokenizer
from llama31_tokenizer.tool_calls import CODE_INTERPRETER, format_tool_call

KNOWLEDGE_DATE = "December 2023"  # of the Llama 3.1 models
_CALL_FORMAT = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_TOOLS_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)
_TOOLS_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
)


@dataclass(frozen=True)
class ToolPrompt:
    """What a prompt says about tools and the date.

    Attributes:
        tools: function definitions in OpenAI's JSON form; they go before the first user's text.
        builtin_tools: names of built-in tools; None does not speak of them.
        date: "Today Date" line.
        tools_in_system: put the functions into the system text instead.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    builtin_tools: Sequence[str] | None = None
    date: str | None = None
    tools_in_system: bool = False

    @property
    def is_set(self) -> bool:
        """Whether the prompt gets a 3.1 system text."""
        return not (self.tools is None and self.builtin_tools is None and self.date is None)


class Llama3Format:
    """Writes dialogs with Llama 3's control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._ids = tokenizer.special_tokens

    def encode_dialog(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, prompt: ToolPrompt
    ) -> EncodedDialog:
        """Ids of a dialog, from `<|begin_of_text|>` on."""
        read = [read_message(raw, index) for index, raw in enumerate(messages)]
        if prompt.is_set:
            read = _with_prompt(read, prompt)
        ids = [self._ids[llama3.BEGIN_OF_TEXT]]
        spans: list[Span] = []
        for message in read:
            ids += self._encode_header(message.role)
            start = len(ids)
            ids += self._encode_body(message, prompt)
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

    def _encode_body(self, message: Message, prompt: ToolPrompt) -> list[int]:
        ids: list[int] = []
        calls = message.tool_calls
        if calls and calls[0].is_builtin:
            ids.append(self._ids[llama3.PYTHON_TAG])
        for part in message.parts:
            ids += self._encode(part)
        for call in calls:
            ids += self._encode(format_tool_call(call, "bare" if prompt.is_set else "typed"))
        waits = message.stop_reason == "end_of_message"
        if message.stop_reason is None and calls:
            waits = prompt.builtin_tools is not None
        ids.append(self._ids[llama3.EOM if waits else llama3.EOT])
        return ids


def _with_prompt(messages: list[Message], prompt: ToolPrompt) -> list[Message]:
    """The messages with the system text of 3.1, and the functions where they belong."""
    system, rest = "", messages
    if messages[0].role == "system":
        system, rest = "".join(messages[0].parts), messages[1:]
    lines = []
    if prompt.builtin_tools is not None or prompt.tools is not None:
        lines.append("Environment: ipython\n")
    if prompt.builtin_tools is not None:
        named = [tool for tool in prompt.builtin_tools if tool != CODE_INTERPRETER]
        lines.append(f"Tools: {', '.join(named)}\n\n")
    lines.append(f"Cutting Knowledge Date: {KNOWLEDGE_DATE}\n")
    if prompt.date is not None:
        lines.append(f"Today Date: {prompt.date}\n")
    lines.append("\n")
    tools = _CALL_FORMAT + "".join(f"{_show_tool(tool)}\n\n" for tool in prompt.tools or ())
    if prompt.tools is not None and prompt.tools_in_system:
        lines.append(_TOOLS_IN_SYSTEM + tools)
    result = [Message("system", ("".join([*lines, system]),)), *rest]
    if prompt.tools is not None and not prompt.tools_in_system:
        if len(result) < 2 or result[1].role != "user":
            raise TokenizerError(
                "tools go before the first user's text, but the dialog does not begin with one; add a user message or "
                "set tools_in_system"
            )
        result[1] = Message("user", ("".join([_TOOLS_IN_USER, tools, *result[1].parts]),))
    return result


def _show_tool(tool: Any) -> str:
    if not isinstance(tool, Mapping):
        raise TokenizerError(f"tools has a {type(tool).__name__}, expected JSON function definitions")
    return json.dumps(tool, ensure_ascii=False, indent=4)
