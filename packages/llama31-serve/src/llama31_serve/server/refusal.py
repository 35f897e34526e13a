"""The server's way to say no: raised anywhere below a handler, turned into a gRPC status by `answers_refusals`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.status_details import encode_details

if TYPE_CHECKING:
    from llama31_serve.server.observer import Observer

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

    def renamed(self, names: Mapping[str, str]) -> Refusal:
        """The same with a front's own names of the fields; `stop_strings` renames `stop_strings[2]` too."""
        if not self.violations or not names:
            return self
        found = []
        for violation in self.violations:
            name, bracket, rest = violation.field.partition("[")
            found.append(FieldViolation(names.get(name, name) + bracket + rest, violation.description))
        return Refusal(self.code, _sentence(found), violations=found, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request whose bytes could not be read."""

    message_name: str


def invalid(violations: Sequence[FieldViolation]) -> Refusal:
    """INVALID_ARGUMENT with every wrong field, in the message too for clients that read no details."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, _sentence(violations), violations=violations)


def unknown_adapter(name: str, loaded: Sequence[str]) -> Refusal:
    """NOT_FOUND, with the names of the adapters that there are."""
    others = f", only {', '.join(loaded)}" if loaded else ""
    return Refusal(grpc.StatusCode.NOT_FOUND, f"no adapter {name!r} is loaded{others}; load it first, or ask for none")


def _sentence(violations: Sequence[FieldViolation]) -> str:
    return "; ".join(f"{violation.field}: {violation.description}" for violation in violations)


class Servicer:
    """What `answers_refusals` asks of a servicer: who hears of refusals, and what the .proto calls checked fields."""

    field_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, observer: Observer) -> None:
        self.observer = observer


def answers_refusals(
    method: Callable[[Any, Any, Context], Awaitable[Response]],
) -> Callable[[Any, Any, Context], Awaitable[Response]]:
    """Decorator of a servicer's coroutine: a Refusal becomes its status, other exceptions INTERNAL and a log entry."""

    @functools.wraps(method)
    async def answer(self: Servicer, request: Any, context: Context) -> Response:
        try:
            if isinstance(request, Malformed):
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"the request's bytes are no {request.message_name}")
            return await method(self, request, context)
        except Refusal as raised:
            refusal = raised.renamed(self.field_names)
            self.observer.refused(refusal.code, method.__name__)
            details = encode_details(refusal.code, refusal.message, refusal.violations, refusal.retry_after_s)
            await context.abort(refusal.code, refusal.message, details)
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("%s failed", method.__name__)
            self.observer.refused(grpc.StatusCode.INTERNAL, method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request; its log says why")
        raise AssertionError("abort raises")

    return answer
