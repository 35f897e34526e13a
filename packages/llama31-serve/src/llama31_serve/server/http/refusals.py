"""How each family of HTTP routes says no: MindIE's status codes and bodies, and OpenAI's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from llama31_serve.server.refusal import Refusal

Code = grpc.StatusCode


class PayloadTooLarge(Refusal):
    """A body over the limit."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.INVALID_ARGUMENT, message)


# The numbers that MindIE's clients expect (its table of RESTful status codes); the rest is HTTP's own.
_MINDIE: Mapping[Code, tuple[int, str]] = {
    Code.INVALID_ARGUMENT: (422, "Input Validation Error"),
    Code.ALREADY_EXISTS: (422, "Input Validation Error"),
    Code.FAILED_PRECONDITION: (400, "Bad Request"),
    Code.UNAUTHENTICATED: (401, "Unauthorized"),
    Code.PERMISSION_DENIED: (403, "Forbidden"),
    Code.NOT_FOUND: (404, "NotFoundError"),
    Code.DEADLINE_EXCEEDED: (408, "Timeout Error"),
    Code.RESOURCE_EXHAUSTED: (503, "Service Unavailable"),
    Code.UNAVAILABLE: (503, "Service Unavailable"),
    Code.INTERNAL: (424, "Generation Error"),
    Code.ABORTED: (424, "Generation Error"),
}
_OPENAI: Mapping[Code, tuple[int, str]] = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error"),
    Code.ALREADY_EXISTS: (409, "invalid_request_error"),
    Code.FAILED_PRECONDITION: (400, "invalid_request_error"),
    Code.UNAUTHENTICATED: (401, "authentication_error"),
    Code.PERMISSION_DENIED: (403, "permission_error"),
    Code.NOT_FOUND: (404, "invalid_request_error"),
    Code.DEADLINE_EXCEEDED: (408, "timeout_error"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    Code.UNAVAILABLE: (503, "service_unavailable_error"),
}
_TOO_LARGE, _MINDIE_ELSE, _OPENAI_ELSE = 413, (424, "Generation Error"), (500, "server_error")


class Door(Protocol):
    """Status and body of a refusal."""

    def status(self, refusal: Refusal) -> int: ...
    def body(self, refusal: Refusal) -> dict[str, Any]: ...
    def headers(self, refusal: Refusal) -> list[tuple[str, str]]: ...


class _Headers:
    def headers(self, refusal: Refusal) -> list[tuple[str, str]]:
        """When to try again, and what is missing."""
        found = []
        if refusal.retry_after_s is not None:
            found.append(("retry-after", str(math.ceil(refusal.retry_after_s))))
        if refusal.code is Code.UNAUTHENTICATED:
            found.append(("www-authenticate", "Bearer"))
        return found


@dataclass(frozen=True)
class MindieDoor(_Headers):
    """`{"error": sentence, "type": kind}`, as MindIE 1.0 writes it; TGI's clients read `error` too."""

    def status(self, refusal: Refusal) -> int:
        """HTTP status."""
        return _TOO_LARGE if isinstance(refusal, PayloadTooLarge) else _MINDIE.get(refusal.code, _MINDIE_ELSE)[0]

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """The JSON body."""
        return {"error": refusal.message, "type": _MINDIE.get(refusal.code, _MINDIE_ELSE)[1]}


@dataclass(frozen=True)
class OpenAiDoor(_Headers):
    """`{"error": {"message", "type", "param", "code"}}`."""

    def status(self, refusal: Refusal) -> int:
        """HTTP status."""
        return _TOO_LARGE if isinstance(refusal, PayloadTooLarge) else _OPENAI.get(refusal.code, _OPENAI_ELSE)[0]

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """The JSON body."""
        param = refusal.violations[0].field if refusal.violations else None
        code = "model_not_found" if refusal.code is Code.NOT_FOUND else None
        kind = _OPENAI.get(refusal.code, _OPENAI_ELSE)[1]
        return {"error": {"message": refusal.message, "type": kind, "param": param, "code": code}}


MINDIE, OPENAI = MindieDoor(), OpenAiDoor()
