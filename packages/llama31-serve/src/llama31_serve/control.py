"""ControlClient: what a server does now, abort one request, drain. For operators, on the server's control listener."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from llama31_serve.channel import Tls, call_metadata, open_channel, plain_options
from llama31_serve.status_details import our_errors
from llama31_serve.stubs import control_pb2 as pb
from llama31_serve.stubs.control_pb2_grpc import ControlServiceStub

State = Literal["loading", "serving", "draining", "failed", "unknown"]

_STATES: dict[int, State] = {
    pb.SERVER_STATE_LOADING: "loading",
    pb.SERVER_STATE_SERVING: "serving",
    pb.SERVER_STATE_DRAINING: "draining",
    pb.SERVER_STATE_FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request that runs, or waits if not `running`. Tokens are 0 while it waits."""

    request_id: str
    running: bool
    prompt_tokens: int
    completion_tokens: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that requests can ask for, and the directory it came from."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server does now, and what it has done since `start_time`."""

    server_version: str
    model_name: str
    state: State
    start_time: datetime
    running_completions: int
    queued_completions: int
    max_running_completions: int
    max_queued_completions: int
    finished_requests: int
    unfinished_requests: int
    overload_refusals: int
    requests: tuple[OpenRequest, ...]


class ControlClient:
    """A blocking client of ControlService. Raises RpcError subclasses, as Client does.

    Args:
        target: "host:port" of the control listener.
        tls: use TLS; None is plaintext.
        token: bearer token sent with every call.
        timeout_s: deadline of every call.
    """

    def __init__(
        self, target: str, *, tls: Tls | None = None, token: str | None = None, timeout_s: float | None = 10.0
    ) -> None:
        self._channel = open_channel(target, tls, plain_options(tls))
        self._stub: Any = ControlServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._call_options = {"timeout": timeout_s, "metadata": call_metadata(token)}

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def server_info(self) -> ServerInfo:
        """What the server does now."""
        with our_errors():
            response = self._stub.GetServerInfo(pb.GetServerInfoRequest(), **self._call_options)
        return _server_info(response)

    def abort(self, request_id: str) -> None:
        """End one request; its caller gets what it has so far. Raises RpcError (NOT_FOUND) if there is none."""
        with our_errors():
            self._stub.Abort(pb.AbortRequest(request_id=request_id), **self._call_options)

    def drain(self) -> int:
        """Have the server refuse new requests, finish what it has, and exit. How many completions it still has."""
        with our_errors():
            response = self._stub.Drain(pb.DrainRequest(), **self._call_options)
        return int(response.remaining_completions)

    def load_adapter(self, name: str, directory: str) -> Adapter:
        """Load a LoRA adapter from a directory of the server's machine."""
        with our_errors():
            request = pb.LoadAdapterRequest(name=name, directory=directory)
            response = self._stub.LoadAdapter(request, **self._call_options)
        return Adapter(response.adapter.name, response.adapter.source)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises RpcError: NOT_FOUND, or FAILED_PRECONDITION while requests use it."""
        with our_errors():
            self._stub.UnloadAdapter(pb.UnloadAdapterRequest(name=name), **self._call_options)

    def list_adapters(self) -> list[Adapter]:
        """The adapters that requests can ask for."""
        with our_errors():
            response = self._stub.ListAdapters(pb.ListAdaptersRequest(), **self._call_options)
        return [Adapter(adapter.name, adapter.source) for adapter in response.adapters]


def _server_info(response: pb.GetServerInfoResponse) -> ServerInfo:
    requests = tuple(
        OpenRequest(r.request_id, r.running, r.prompt_tokens, r.completion_tokens, r.age.ToNanoseconds() / 1e9)
        for r in response.requests
    )
    return ServerInfo(
        server_version=response.server_version,
        model_name=response.model_name,
        state=_STATES.get(response.state, "unknown"),
        start_time=response.start_time.ToDatetime(tzinfo=UTC),
        running_completions=response.running_completions,
        queued_completions=response.queued_completions,
        max_running_completions=response.max_running_completions,
        max_queued_completions=response.max_queued_completions,
        finished_requests=response.finished_requests,
        unfinished_requests=response.unfinished_requests,
        overload_refusals=response.overload_refusals,
        requests=requests,
    )
