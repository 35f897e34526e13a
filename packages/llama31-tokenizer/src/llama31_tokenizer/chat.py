"""Dialogs to ids: messages in, ids and the spans an assistant wrote out.

Llama 3 vocabularies get Meta's header format; others the chat template of their directory, in jinja2's sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama31_tokenizer.assistant import AssistantMessage, parse_assistant
from llama31_tokenizer.controls import is_llama3
from llama31_tokenizer.dialog import EncodedDialog
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.llama3 import START_HEADER
from llama31_tokenizer.llama3_chat import Llama3Format, ToolPrompt
from llama31_tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama31_tokenizer.chat_template import TemplateFormat

Messages = Sequence[Mapping[str, Any]]


class ChatFormat:
    """The chat format of a tokenizer.

    Args:
        tokenizer: with Llama 3's control tokens, or with a chat template.
        style: "llama3" or "template" to choose; "auto" takes Llama 3's format where the vocabulary has its control
            tokens, unless the directory's template writes another one.
    """

    def __init__(self, tokenizer: Tokenizer, style: Literal["auto", "llama3", "template"] = "auto") -> None:
        self.tokenizer = tokenizer
        template = tokenizer.vocabulary.chat_template
        if style == "auto":
            own = is_llama3(tokenizer.special_tokens) and (template is None or START_HEADER in template)
            style = "llama3" if own else "template"
        self.style = style
        self._format: Llama3Format | TemplateFormat
        if style == "llama3":
            self._format = Llama3Format(tokenizer)
        elif template is not None:
            from llama31_tokenizer.chat_template import TemplateFormat  # needs jinja2, which takes time to import

            self._format = TemplateFormat(tokenizer, template)
        else:
            raise TokenizerError(
                f"{tokenizer.vocabulary.source}: no Llama 3 control tokens and no chat template, so no chat format; "
                "put the model's tokenizer_config.json or chat_template.jinja beside it and give the directory"
            )

    def encode_dialog(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        builtin_tools: Sequence[str] | None = None,
        date: str | None = None,
        tools_in_system: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> EncodedDialog:
        """Ids of a whole dialog.

        Args:
            messages: mappings with `role` (system, user, assistant, tool, ipython) and `content` (a string or text
                parts); an assistant's may have `tool_calls`, and `stop_reason` "end_of_message".
            add_generation_prompt: end with the start of an assistant's turn, for the model to go on.
            tools: JSON function definitions, as OpenAI's clients send them.
            builtin_tools: of brave_search, wolfram_alpha, code_interpreter.
            date: today's, as in "26 Jul 2024"; 3.1 then gets its two date lines.
            tools_in_system: put the functions into the system text, not before the first user's.
            variables: more values for a Jinja template.

        Raises:
            TokenizerError: an unknown role, content that is no text, or a template that refuses the dialog.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise TokenizerError("messages must be a non-empty list of mappings with role and content")
        if tools is not None and (not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools)):
            raise TokenizerError("tools must be a list of function definitions, each a mapping")
        if isinstance(self._format, Llama3Format):
            if variables:
                raise TokenizerError(
                    f"variables {sorted(variables)} are for Jinja templates, Llama 3's format has none"
                )
            prompt = ToolPrompt(tools, builtin_tools, date, tools_in_system)
            return self._format.encode_dialog(messages, add_generation_prompt, prompt)
        named = {
            "builtin_tools": builtin_tools,
            "date_string": date,
            "tools_in_user_message": False if tools_in_system else None,
        }
        stated = {name: value for name, value in named.items() if value is not None}
        return self._format.encode_dialog(
            messages, add_generation_prompt, {"tools": tools, "documents": None, **stated, **(variables or {})}
        )

    def parse_assistant(self, ids: Sequence[int]) -> AssistantMessage:
        """An assistant's ids (from behind its header on) read back to text and tool calls."""
        return parse_assistant(self.tokenizer, ids)
