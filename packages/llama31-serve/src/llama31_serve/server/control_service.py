"""llama31.inference.v1.ControlService: what an operator sees and does."""
# ruff: noqa: N802  the methods are named in the .proto

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from llama31_serve import __version__
from llama31_serve.server.admission import Admission
from llama31_serve.server.generator import Generator
from llama31_serve.server.lifecycle import Lifecycle, State
from llama31_serve.server.open_requests import OpenRequest, OpenRequests
from llama31_serve.server.refusal import Context, Refusal, answers_refusals, invalid
from llama31_serve.server.validation import unknown_fields
from llama31_serve.stubs import control_pb2 as pb
from llama31_serve.stubs.control_pb2_grpc import ControlServiceServicer

_STATES: dict[State, pb.ServerState] = {
    State.LOADING: pb.SERVER_STATE_LOADING,
    State.SERVING: pb.SERVER_STATE_SERVING,
    State.DRAINING: pb.SERVER_STATE_DRAINING,
    State.FAILED: pb.SERVER_STATE_FAILED,
}


@dataclass(frozen=True, slots=True)
class Controlled:
    """The parts of a server that the service reads and acts on. `generator` gives None before the model is loaded."""

    model_name: str
    lifecycle: Lifecycle
    admission: Admission
    requests: OpenRequests
    generator: Callable[[], Generator | None]
    request_drain: Callable[[], None]


class ControlService(ControlServiceServicer):
    """The servicer."""

    def __init__(self, controlled: Controlled) -> None:
        self._controlled = controlled
        self._start_time_s = time.time()

    @answers_refusals
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        _require_known(request)
        admission, requests = self._controlled.admission, self._controlled.requests
        response = pb.GetServerInfoResponse(
            server_version=__version__,
            model_name=self._controlled.model_name,
            state=_STATES[self._controlled.lifecycle.state],
            running_completions=admission.num_running,
            queued_completions=admission.num_held - admission.num_running,
            max_running_completions=admission.max_running,
            max_queued_completions=admission.max_held - admission.max_running,
            finished_requests=requests.num_finished,
            unfinished_requests=requests.num_unfinished,
            overload_refusals=admission.num_refused,
            requests=[_open_request(entry) for entry in requests.all()],
        )
        response.start_time.FromNanoseconds(round(self._start_time_s * 1e9))
        return response

    @answers_refusals
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        _require_known(request)
        generator = self._controlled.generator()
        if generator is None or not generator.abort(request.request_id):
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"no request runs or waits under the id {request.request_id!r}")
        return pb.AbortResponse()

    @answers_refusals
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        _require_known(request)
        self._controlled.request_drain()
        return pb.DrainResponse(remaining_completions=self._controlled.admission.num_held)


def _require_known(request: pb.GetServerInfoRequest | pb.AbortRequest | pb.DrainRequest) -> None:
    wrong = list(unknown_fields(request))
    if wrong:
        raise invalid(wrong)


def _open_request(entry: OpenRequest) -> pb.OpenRequest:
    message = pb.OpenRequest(request_id=entry.request_id)
    if entry.generation is not None:
        message.running = True
        message.prompt_tokens = entry.generation.num_prompt_tokens
        message.completion_tokens = entry.generation.num_tokens_made
    message.age.FromNanoseconds(round((time.monotonic() - entry.arrived_s) * 1e9))
    return message
