"""What an assistant generated, read back: its ids in, its text and tool calls out.

Formats read: JSON calls with `parameters` or `arguments` (several, separated by `;` or white space, as Llama 3.1 writes
them), `<function=name>{…}</function>`, `[name(key=value)]`, `<tool_call>{…}</tool_call>`, `tool.call(query="…")` of the
built-in tools, and code behind `<|python_tag|>`. What is none of these, or is broken, stays text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama31_tokenizer import llama3
from llama31_tokenizer.tokenizer import Tokenizer
from llama31_tokenizer.tool_calls import CODE_INTERPRETER, SEARCH_TOOLS, ToolCall

_BUILTIN = re.compile(rf'({"|".join(SEARCH_TOOLS)})\.call\(query="([^"]*)"\)')
_FUNCTION_TAG = re.compile(r"<function=([^>]+)>(.*?)</function>", re.DOTALL)
_TOOL_CALL_TAG = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
_BETWEEN = re.compile(r"[\s;]*")


@dataclass(frozen=True)
class AssistantMessage:
    """One turn of an assistant.

    Attributes:
        content: its text; empty when all of it was tool calls.
        tool_calls: in the order written.
        stop_reason: "end_of_turn", "end_of_message" (it waits for a tool), or "out_of_tokens".
    """

    content: str
    tool_calls: tuple[ToolCall, ...]
    stop_reason: str

    def as_message(self) -> dict[str, Any]:
        """The mapping `ChatFormat.encode_dialog` takes."""
        return {
            "role": "assistant",
            "content": self.content,
            "tool_calls": list(self.tool_calls),
            "stop_reason": None if self.stop_reason == "out_of_tokens" else self.stop_reason,
        }


def parse_assistant(tokenizer: Tokenizer, ids: Sequence[int]) -> AssistantMessage:
    """Read the ids an assistant wrote after its header; what follows its first stop token is left out."""
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    stop_reason = "out_of_tokens"
    for index, token_id in enumerate(ids):
        if token_id in tokenizer.stop_ids:
            stop_reason = "end_of_message" if names.get(token_id) == llama3.EOM else "end_of_turn"
            ids = ids[:index]
            break
    is_code = bool(ids) and names.get(ids[0]) == llama3.PYTHON_TAG
    text = tokenizer.decode(ids, skip_special_tokens=True)
    calls = find_tool_calls(text, is_code=is_code)
    return AssistantMessage("" if calls else text, calls, stop_reason)


def find_tool_calls(text: str, *, is_code: bool = False) -> tuple[ToolCall, ...]:
    """The calls a text consists of; none if anything else is in it.

    Args:
        text: without control tokens.
        is_code: `<|python_tag|>` stood before it, so what is no call of a tool is code to run.
    """
    stripped = text.strip()
    builtin = _BUILTIN.fullmatch(stripped)
    if builtin:
        return (ToolCall(builtin[1], {"query": builtin[2]}),)
    calls = _read_tags(stripped) or _read_json_calls(stripped) or _read_python_list(stripped)
    if not calls and is_code:
        return (ToolCall(CODE_INTERPRETER, {"code": text}),)
    return calls


def _read_tags(text: str) -> tuple[ToolCall, ...]:
    tags = [*_FUNCTION_TAG.finditer(text)]
    if tags and not _FUNCTION_TAG.sub("", text).strip(" ;\n"):
        found = [(tag[1], _load(tag[2])) for tag in tags]
        if all(isinstance(arguments, Mapping) for _, arguments in found):
            return tuple(ToolCall(name, arguments) for name, arguments in found)
    bodies = _TOOL_CALL_TAG.findall(text)
    if bodies and not _TOOL_CALL_TAG.sub("", text):
        calls = [_read_json_calls(body.strip()) for body in bodies]
        if all(calls):
            return tuple(call for group in calls for call in group)
    return ()


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _read_json_calls(text: str) -> tuple[ToolCall, ...]:
    decoder = json.JSONDecoder()
    calls = []
    at = 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            return ()
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return ()
        arguments = value.get("parameters", value.get("arguments"))
        if not isinstance(arguments, dict):
            return ()
        calls.append(ToolCall(value["name"], arguments))
        between = _BETWEEN.match(text, at)
        at = between.end() if between else at
    return tuple(calls)


def _read_python_list(text: str) -> tuple[ToolCall, ...]:
    if not (text.startswith("[") and text.endswith("]")):
        return ()
    try:
        expression = ast.parse(text, mode="eval").body
        if not isinstance(expression, ast.List):
            return ()
        calls = []
        for item in expression.elts:
            if not isinstance(item, ast.Call) or not isinstance(item.func, ast.Name) or item.args:
                return ()
            named = {str(one.arg): ast.literal_eval(one.value) for one in item.keywords if one.arg}
            if len(named) != len(item.keywords):
                return ()
            calls.append(ToolCall(item.func.id, named))
        return tuple(calls)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return ()
