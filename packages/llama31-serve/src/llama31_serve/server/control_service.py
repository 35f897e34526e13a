"""llama31.inference.v1.ControlService: what an operator sees and does."""
# ruff: noqa: N802  the methods are named in the .proto

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from llama31_serve import __version__
from llama31_serve.errors import FieldViolation
from llama31_serve.server.admission import Admission
from llama31_serve.server.engine import Adapter, AdapterError, Engine, UnknownAdapterError
from llama31_serve.server.engine_thread import EngineThread
from llama31_serve.server.generation_request import MAX_ADAPTER_CHARACTERS
from llama31_serve.server.generator import Generator
from llama31_serve.server.lifecycle import Lifecycle, State
from llama31_serve.server.observer import Observer
from llama31_serve.server.open_requests import OpenRequest, OpenRequests
from llama31_serve.server.refusal import Context, Refusal, Servicer, answers_refusals, invalid
from llama31_serve.server.validation import require_known_fields
from llama31_serve.stubs import control_pb2 as pb
from llama31_serve.stubs.control_pb2_grpc import ControlServiceServicer

Answer = TypeVar("Answer")
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
    engine: EngineThread
    request_drain: Callable[[], None]


class ControlService(Servicer, ControlServiceServicer):
    """The servicer."""

    def __init__(self, controlled: Controlled, observer: Observer) -> None:
        super().__init__(observer)
        self._controlled = controlled
        self._start_time_s = time.time()

    @answers_refusals
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        require_known_fields(request)
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
        require_known_fields(request)
        generator = self._controlled.generator()
        if generator is None or not generator.abort(request.request_id):
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"no request runs or waits under the id {request.request_id!r}")
        return pb.AbortResponse()

    @answers_refusals
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        require_known_fields(request)
        self._controlled.request_drain()
        return pb.DrainResponse(remaining_completions=self._controlled.admission.num_held)

    @answers_refusals
    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        require_known_fields(request)
        wrong = [FieldViolation(name, "is empty") for name in ("name", "directory") if not getattr(request, name)]
        if (length := len(request.name)) > MAX_ADAPTER_CHARACTERS:
            wrong.append(FieldViolation("name", f"has {length} characters, at most {MAX_ADAPTER_CHARACTERS}"))
        if request.name == self._controlled.model_name:  # which HTTP's callers could not tell from the adapter
            wrong.append(FieldViolation("name", f"{request.name!r} is the model's own; choose another"))
        if wrong:
            raise invalid(wrong)
        directory = Path(request.directory)
        loaded = await self._with_engine(lambda engine: engine.load_adapter(request.name, directory))
        return pb.LoadAdapterResponse(adapter=_adapter(loaded))

    @answers_refusals
    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        require_known_fields(request)
        await self._with_engine(lambda engine: engine.unload_adapter(request.name))
        return pb.UnloadAdapterResponse()

    @answers_refusals
    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        require_known_fields(request)
        adapters = await self._with_engine(lambda engine: engine.adapters())
        return pb.ListAdaptersResponse(adapters=[_adapter(adapter) for adapter in adapters])

    async def _with_engine(self, function: Callable[[Engine], Answer]) -> Answer:
        """Do something between two steps of the engine."""
        if self._controlled.generator() is None:
            self._controlled.lifecycle.require_serving()
        try:
            return await asyncio.wrap_future(self._controlled.engine.call(function))
        except UnknownAdapterError as error:
            raise Refusal(grpc.StatusCode.NOT_FOUND, str(error)) from error
        except AdapterError as error:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error


def _adapter(adapter: Adapter) -> pb.Adapter:
    return pb.Adapter(name=adapter.name, source=adapter.source)


def _open_request(entry: OpenRequest) -> pb.OpenRequest:
    message = pb.OpenRequest(request_id=entry.request_id)
    if entry.generation is not None:
        message.running = True
        message.prompt_tokens = entry.generation.num_prompt_tokens
        message.completion_tokens = entry.generation.num_tokens_made
    message.age.FromNanoseconds(round((time.monotonic() - entry.arrived_s) * 1e9))
    return message
