"""One record of any supported schema in, a list of `{"role", "content"}` messages out.

| schema   | looks like                                                            |
|----------|-----------------------------------------------------------------------|
| alpaca   | `{"instruction", "input", "output"}`                                  |
| sharegpt | `{"conversations": [{"from": "human" or "gpt" or "system", "value"}]}` |
| messages | `{"messages": [{"role", "content"}]}` (OpenAI)                        |
| text     | `{"text"}`: plain text, for continued pre-training                    |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama31_data.alpaca import prompt_and_answer
from llama31_data.errors import RecordError, kind_of

SCHEMAS = ("alpaca", "sharegpt", "messages", "text")
_KEY_OF_SCHEMA = {"alpaca": "instruction", "sharegpt": "conversations", "messages": "messages", "text": "text"}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MESSAGE_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}


class Dialog(NamedTuple):
    """Messages fit for a template, and how many turns before the first question were left out."""

    messages: list[dict[str, str]]
    dropped_turns: int


def schema_of(record: object) -> str:
    """The schema a record has, by its keys.

    Raises:
        RecordError: it has none of the known ones; the message lists its keys.
    """
    if not isinstance(record, dict):
        raise RecordError(f"is {kind_of(record)}, expected an object with one of the known schemas")
    for schema, key in _KEY_OF_SCHEMA.items():
        if key in record:
            return schema
    keys = ", ".join(sorted(map(str, record))[:8]) or "no keys"
    raise RecordError(
        f"no known schema: has {keys}; expected instruction/output (alpaca), conversations (sharegpt), "
        "messages (OpenAI) or text"
    )


def checked_schema(record: object, wanted: str) -> str:
    """`schema_of(record)`, which must be `wanted` unless that is "auto".

    Raises:
        RecordError: another schema; the message names the one it looks like.
    """
    found = schema_of(record)
    if wanted not in ("auto", found):
        raise RecordError(f"looks like schema {found!r}, expected {wanted!r}")
    return found


def to_dialog(record: Mapping[str, Any], schema: str) -> Dialog:
    """The messages of an alpaca, sharegpt or messages record.

    Turns of the assistant that come before the first question are left out and counted: nobody asked for them.

    Raises:
        RecordError: a field of the wrong type, an unknown role, turns out of order, or no assistant turn.
    """
    if schema == "alpaca":
        prompt, answer = prompt_and_answer(record)
        return Dialog([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], 0)
    if schema == "sharegpt":
        turns = _turns(record["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)
    elif schema == "messages":
        turns = _turns(record["messages"], "messages", "role", "content", _MESSAGE_ROLES)
    else:
        raise RecordError("is plain text, expected a conversation; use --dataset_type wiki for text")
    return _in_order(turns)


def _turns(value: object, field: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"field {field!r} is {kind_of(value)}, expected a list of turns")
    turns = []
    for number, turn in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise RecordError(f"{where} is {kind_of(turn)}, expected an object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in roles:
            raise RecordError(f"{where}.{role_key} is {role!r}, expected one of {', '.join(roles)}")
        if not isinstance(text, str):
            raise RecordError(f"{where}.{text_key} is {kind_of(text)}, expected text")
        turns.append({"role": roles[role], "content": text})
    return turns


def _in_order(turns: list[dict[str, str]]) -> Dialog:
    """Checks [system], user, assistant, user, assistant, …"""
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    rest = turns[len(system) :]
    first_user = next((i for i, turn in enumerate(rest) if turn["role"] == "user"), len(rest))
    dropped = first_user
    for turn in rest[:first_user]:
        if turn["role"] == "system":
            raise RecordError("a system turn after the first turn; expected it first or not at all")
    rest = rest[first_user:]
    for number, turn in enumerate(rest):
        expected = "user" if number % 2 == 0 else "assistant"
        if turn["role"] != expected:
            where = len(system) + dropped + number
            raise RecordError(f"turn {where} is from {turn['role']!r}, expected {expected!r}: turns must alternate")
    if len(rest) < 2:
        raise RecordError("no assistant turn after a user turn: nothing to train on")
    return Dialog(system + rest, dropped)
