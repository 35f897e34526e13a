"""Every error that llama31_serve raises. A client sees the subclass of RpcError that fits the status code."""

from __future__ import annotations

from dataclasses import dataclass

import grpc


class ServeError(Exception):
    """Base of all errors of this package."""


class StartError(ServeError):
    """The server cannot start; the message says what to change."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path in the message and what is wrong with it."""

    field: str
    description: str


class RpcError(ServeError):
    """A call ended with a status other than OK.

    Attributes:
        code: the gRPC status code.
        message: the server's sentence.
        violations: wrong fields, when the code is INVALID_ARGUMENT.
        retry_after_s: when to try again, if the server said so.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after_s = retry_after_s


class InvalidRequestError(RpcError):
    """The request is wrong and will stay so; `violations` names the fields."""


class OverloadedError(RpcError):
    """The server is full; try again after `retry_after_s`."""


class UnavailableError(RpcError):
    """Nobody answers at this address, or the server is loading or draining."""


class DeadlineError(RpcError):
    """The deadline passed before the answer was complete."""


class CancelledError(RpcError):
    """The call was cancelled."""


class AuthenticationError(RpcError):
    """The token is missing or wrong, or does not allow this."""


ERROR_BY_CODE: dict[grpc.StatusCode, type[RpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
}
