"""Who makes the request that this task answers, and by which door; set by the fronts before they call anything else."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Caller:
    """A request's origin.

    Attributes:
        tenant: name that goes with the bearer token.
        method: gRPC method or HTTP path.
        traceparent: W3C trace context, "" if there is none.
    """

    tenant: str = ANONYMOUS
    method: str = ""
    traceparent: str = ""


_NOBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("llama31_caller", default=_NOBODY)
