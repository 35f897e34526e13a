"""What can be told of requests, to metrics, access log and traces. The event loop calls every method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from llama31_serve.server.caller import Caller
from llama31_serve.server.generation import Durations


@dataclass(slots=True)
class RequestRecord:
    """One request that passed validation, told when it arrives and again when it has ended.

    Attributes:
        code: how it ended; OK if all its completions did.
        dropped_prompt_tokens: how much of its prompt was cut off.
        clamped: whether it got a smaller max_tokens than it asked for.
        durations: None if the engine never had it.
    """

    request_id: str
    caller: Caller
    n: int
    arrived_at: float = field(default_factory=time.time)
    prompt_tokens: int = 0
    dropped_prompt_tokens: int = 0
    clamped: bool = False
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    durations: Durations | None = None
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN


class Observer:
    """Hears everything and does nothing; subclasses pick what they want."""

    def received(self, record: RequestRecord) -> None:
        """A request that passed validation has come."""

    def tokens(self, count: int, gap_s: float | None) -> None:
        """A step made tokens for a completion, `gap_s` after those before; None for its first."""

    def ended(self, record: RequestRecord) -> None:
        """A request has ended, one way or another."""

    def refused(self, code: grpc.StatusCode, method: str) -> None:
        """A call was answered with an error."""


class Observers(Observer):
    """Tells several."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def received(self, record: RequestRecord) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.received(record)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.tokens(count, gap_s)

    def ended(self, record: RequestRecord) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.ended(record)

    def refused(self, code: grpc.StatusCode, method: str) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.refused(code, method)
