"""JSON bodies in, checked values out; every wrong field is named at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from llama31_serve.errors import FieldViolation
from llama31_serve.server.generation_request import GenerationRequest, Limits, require_valid
from llama31_serve.server.refusal import Refusal, invalid

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


def checked_request(
    request: GenerationRequest, limits: Limits, wrong: Sequence[FieldViolation], names: Mapping[str, str]
) -> GenerationRequest:
    """The request. Raises Refusal (INVALID_ARGUMENT) with all wrong fields, by the names that the body has for them."""
    try:
        require_valid(request, limits, wrong)
    except Refusal as refusal:
        raise refusal.renamed(names) from None
    return request


def or_else(value: Any, default: Any) -> Any:
    """A field that may be null."""
    return default if value is None else value


def strings(stop: list[str] | str | None) -> tuple[str, ...]:
    """A field that is one string or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _violation(kind: str, location: tuple[int | str, ...], message: str) -> FieldViolation:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return FieldViolation(path or "body", _OWN_WORDS.get(kind, message[:1].lower() + message[1:]))
