"""The server's way to say no: raised anywhere below a handler, turned into a gRPC status by `answers_refusals`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.status_details import encode_details

logger = logging.getLogger(__name__)

Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]


class Refusal(Exception):  # noqa: N818  a status, not a fault of ours
    """Ends a call with `code` and `message`."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request whose bytes could not be read."""

    message_name: str


def invalid(violations: Sequence[FieldViolation]) -> Refusal:
    """INVALID_ARGUMENT with every wrong field, in the message too for clients that read no details."""
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message, violations=violations)


def answers_refusals(
    method: Callable[[Any, Any, Context], Awaitable[Response]],
) -> Callable[[Any, Any, Context], Awaitable[Response]]:
    """Decorator of a servicer's coroutine: a Refusal becomes its status, other exceptions INTERNAL and a log entry."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Context) -> Response:
        try:
            if isinstance(request, Malformed):
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"the request's bytes are no {request.message_name}")
            return await method(self, request, context)
        except Refusal as refusal:
            details = encode_details(refusal.code, refusal.message, refusal.violations, refusal.retry_after_s)
            await context.abort(refusal.code, refusal.message, details)
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("%s failed", method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request; its log says why")
        raise AssertionError("abort raises")

    return answer
