"""Chat messages as callers write them: any mapping in, a checked `Message` out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.tool_calls import ToolCall, read_tool_calls

ROLES = ("system", "user", "assistant", "tool", "ipython")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        parts: its text, as one part or as many as the content had.
        tool_calls: what an assistant called.
        stop_reason: "end_of_turn", or "end_of_message" for an assistant that waits for a tool's answer.
    """

    role: str
    parts: tuple[str, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    stop_reason: str | None = None


def read_message(raw: Any, index: int) -> Message:
    """Check one message.

    Raises:
        TokenizerError: naming `messages[index]` and the field.
    """
    where = f"messages[{index}]"
    if not isinstance(raw, Mapping):
        raise TokenizerError(f"{where} is a {type(raw).__name__}, expected a mapping with role and content")
    role = raw.get("role")
    if role not in ROLES:
        raise TokenizerError(f"{where}.role is {role!r}, allowed are {', '.join(ROLES)}")
    calls = read_tool_calls(raw.get("tool_calls"), where)
    if calls and role != "assistant":
        raise TokenizerError(f"{where}.tool_calls is set for role {role!r}, only an assistant calls tools")
    stop_reason = raw.get("stop_reason")
    if stop_reason not in (None, "end_of_turn", "end_of_message"):
        raise TokenizerError(f"{where}.stop_reason is {stop_reason!r}, allowed are end_of_turn and end_of_message")
    content = raw.get("content")
    if role in ("tool", "ipython") and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    return Message(role, read_content(content, where, optional=bool(calls)), calls, stop_reason)


def read_content(content: Any, where: str, *, optional: bool = False) -> tuple[str, ...]:
    """Text parts of a message's content: a string, or a list of `{"type": "text", "text": …}`."""
    if content is None and optional:
        return ()
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise TokenizerError(
            f"{where}.content is a {type(content).__name__}, expected a string or a list of text parts"
        )
    parts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise TokenizerError(f"{where}.content[{number}] is {kind!r}, only text parts can be encoded")
    return tuple(parts)
