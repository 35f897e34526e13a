"""JSON bodies in, checked values out; every wrong field is named at once."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from llama31_serve.errors import FieldViolation
from llama31_serve.server.refusal import invalid

_OWN_WORDS = {
    "extra_forbidden": "is a field this server does not know; leave it out",
    "missing": "is missing",
}


class Body(BaseModel):
    """A JSON object: no field that is not declared, no number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Read a body. Raises Refusal (INVALID_ARGUMENT) with all wrong fields."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid([_violation(problem["type"], problem["loc"], problem["msg"]) for problem in problems]) from None


def has_field(data: bytes, name: str) -> bool:
    """Whether a body is an object with this field."""
    try:
        value: Any = from_json(data)
    except ValueError:
        return False
    return isinstance(value, dict) and name in value


def _violation(kind: str, location: tuple[int | str, ...], message: str) -> FieldViolation:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return FieldViolation(path or "body", _OWN_WORDS.get(kind, message[:1].lower() + message[1:]))
