"""Every request from its arrival to its end: what an operator sees, aborts, and counts afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import grpc

from llama31_serve.server.admission import Place
from llama31_serve.server.generation import Generation
from llama31_serve.server.refusal import Refusal


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that was accepted and has not ended. `generation` is there once the engine has it."""

    request_id: str
    place: Place
    arrived_s: float = field(default_factory=time.monotonic)
    generation: Generation | None = None

    def fail(self, refusal: Refusal) -> None:
        """End it with an error, wherever it is."""
        if self.generation is None:
            self.place.refuse(refusal)
        else:
            self.generation.fail(refusal)


class OpenRequests:
    """The accepted requests by id, oldest first. Used on the event loop alone."""

    def __init__(self) -> None:
        self.num_finished = 0
        self.num_unfinished = 0
        self._by_id: dict[str, OpenRequest] = {}

    def require_free(self, request_id: str) -> None:
        """Raises Refusal (ALREADY_EXISTS) if a request of this id is open."""
        if request_id in self._by_id:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id {request_id!r} belongs to a request that is still running; choose another",
            )

    def add(self, request_id: str, place: Place) -> OpenRequest:
        """A request that was just accepted."""
        request = self._by_id[request_id] = OpenRequest(request_id, place)
        return request

    def remove(self, request: OpenRequest, *, finished: bool) -> None:
        """A request that has ended; `finished` if with everything that was asked for."""
        del self._by_id[request.request_id]
        self.num_finished += finished
        self.num_unfinished += not finished

    def get(self, request_id: str) -> OpenRequest | None:
        """The open request of this id."""
        return self._by_id.get(request_id)

    def all(self) -> list[OpenRequest]:
        """Every open request, oldest first."""
        return list(self._by_id.values())
