"""google.rpc error details to and from the trailing metadata of a call: the one place that knows their encoding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import grpc

from llama31_serve.errors import ERROR_BY_CODE, FieldViolation, RpcError

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # what gRPC's own retries obey; RetryInfo is for programs


def encode_details(
    code: grpc.StatusCode, message: str, violations: Sequence[FieldViolation] = (), retry_after_s: float | None = None
) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata with a google.rpc.Status that holds BadRequest and RetryInfo as needed; empty if neither is."""
    from google.rpc import error_details_pb2, status_pb2

    if not violations and retry_after_s is None:
        return ()
    status = status_pb2.Status(code=code.value[0], message=message)
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad_request)
    if retry_after_s is not None:
        retry_info = error_details_pb2.RetryInfo()
        retry_info.retry_delay.FromNanoseconds(math.ceil(retry_after_s * 1e9))
        status.details.add().Pack(retry_info)
    metadata: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if retry_after_s is not None:
        metadata.append((PUSHBACK_KEY, str(math.ceil(retry_after_s * 1e3))))
    return tuple(metadata)


def decode_details(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[tuple[FieldViolation, ...], float | None]:
    """The field violations and the retry delay (s) that trailing metadata carries."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    for key, value in metadata:
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:  # a proxy's own metadata: the status code and message still stand
            continue
        for detail in status.details:
            bad_request, retry_info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad_request):
                violations += [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
            elif detail.Unpack(retry_info):
                retry_after_s = retry_info.retry_delay.ToNanoseconds() / 1e9
    return tuple(violations), retry_after_s


class FailedCall(Protocol):
    """What grpc.RpcError (of a call) and grpc.aio.AioRpcError have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def error_of(call: FailedCall) -> RpcError:
    """The RpcError subclass that fits a failed call."""
    code = call.code()
    violations, retry_after_s = decode_details(call.trailing_metadata() or ())
    return ERROR_BY_CODE.get(code, RpcError)(code, call.details() or "no details", violations, retry_after_s)


@contextmanager
def our_errors() -> Iterator[None]:
    """Turns the grpc errors of the calls in its block into this package's."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(cast(FailedCall, error)) from None  # what gRPC raises for a failed call has a status
