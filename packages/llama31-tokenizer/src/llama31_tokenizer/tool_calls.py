"""Tool calls in Llama 3.1's formats: a call in, the text the model writes for it out, and back.

Formats: Meta's llama-models 0.3.0, `llama3/tool_utils.py` and `llama3_1/prompt_format.md`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama31_tokenizer.errors import TokenizerError

SEARCH_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_INTERPRETER = "code_interpreter"
BUILTIN_TOOLS = (*SEARCH_TOOLS, CODE_INTERPRETER)


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None

    @property
    def is_builtin(self) -> bool:
        """Whether the model calls it through `<|python_tag|>`."""
        return self.name in BUILTIN_TOOLS


def read_tool_calls(raw: Any, where: str) -> tuple[ToolCall, ...]:
    """Calls as in a message: `ToolCall`, OpenAI's `{"function": {"name", "arguments"}}`, or `{"name", "arguments"}`.

    Raises:
        TokenizerError: naming the call and what was expected.
    """
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise TokenizerError(f"{where}.tool_calls is a {type(raw).__name__}, expected a list")
    calls = []
    for number, call in enumerate(raw):
        if isinstance(call, ToolCall):
            calls.append(call)
            continue
        at = f"{where}.tool_calls[{number}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TokenizerError(f"{at} has no function name, expected {{'name': …, 'arguments': {{…}}}}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as error:
                raise TokenizerError(f"{at}.arguments is not JSON ({error.msg} at {error.pos})") from error
        if not isinstance(arguments, Mapping):
            raise TokenizerError(f"{at}.arguments is a {type(arguments).__name__}, expected an object")
        calls.append(ToolCall(function["name"], arguments, call.get("id")))
    return tuple(calls)


def format_tool_call(call: ToolCall, style: Literal["typed", "bare"] = "typed") -> str:
    """The text an assistant writes for a call, without control tokens.

    Args:
        call: of a built-in tool, or of a function.
        style: a function's JSON with `"type": "function"` first, as in Meta's code, or with name and parameters alone,
            as the prompts with tools ask for.

    Raises:
        TokenizerError: a built-in tool without its argument, or arguments that are not JSON.
    """
    key = "code" if call.name == CODE_INTERPRETER else "query"
    if call.is_builtin and not isinstance(call.arguments.get(key), str):
        raise TokenizerError(f"tool call {call.name}: arguments have no string {key!r}, the built-in tool needs it")
    if call.name == CODE_INTERPRETER:
        return str(call.arguments["code"])
    if call.is_builtin:
        return f'{call.name}.call(query="{call.arguments["query"]}")'
    function = {"name": call.name, "parameters": dict(call.arguments)}
    try:
        if style == "bare":
            return json.dumps(function, ensure_ascii=False)
        return json.dumps({"type": "function", **function})
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"tool call {call.name}: arguments are not JSON ({error})") from error
