"""Every HTTP listener of the server, and which route is behind which."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llama31_serve.server.http.call import Endpoint, encode_json
from llama31_serve.server.http.caller_check import CallerCheck
from llama31_serve.server.http.chat_routes import ChatRoutes
from llama31_serve.server.http.completion_routes import CompletionRoutes
from llama31_serve.server.http.exposition import Exposition
from llama31_serve.server.http.listener import HttpListener
from llama31_serve.server.http.management_routes import ManagementRoutes
from llama31_serve.server.http.page import Page
from llama31_serve.server.http.refusals import MINDIE, OPENAI, Door
from llama31_serve.server.http.simple_routes import SimpleRoutes
from llama31_serve.server.http.text_routes import TextRoutes
from llama31_serve.server.lifecycle import Lifecycle
from llama31_serve.server.listener import Security
from llama31_serve.server.observer import Observer
from llama31_serve.server.options import ServerOptions
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.serving_model import ModelHolder
from llama31_serve.server.status import Status

OPENAI_PREFIX, MINDIES_OWN = "/v1/", "/v1/tokenizer"


@dataclass(frozen=True, slots=True)
class HttpParts:
    """The parts of a server that the routes work with."""

    holder: ModelHolder
    lifecycle: Lifecycle
    observer: Observer
    status: Status
    request_drain: Callable[[], None]


class HttpDoors:
    """Business, management and metrics, each where the options say so.

    Raises:
        StartError: certificates that can't be used.
    """

    def __init__(
        self, options: ServerOptions, security: Security, management_security: Security, parts: HttpParts
    ) -> None:
        self.business: HttpListener | None = None
        self.management: HttpListener | None = None
        self.metrics: HttpListener | None = None
        exposition = Exposition(parts.status, options.model_name)
        metrics = Route("/metrics", Endpoint(exposition.metrics, MINDIE, parts.observer), methods=["GET"])
        if options.http_port is not None:
            app = _guarded(_business_routes(parts), security, parts)
            self.business = HttpListener(app, options.host, options.http_port, _tls(security))
        if options.management_port is not None:
            app = _guarded([*_management_routes(parts, options), metrics], management_security, parts)
            port = options.management_port
            self.management = HttpListener(app, options.control_host, port, _tls(management_security))
        if options.metrics_port is not None and options.metrics_port != (options.management_port or None):
            app = _guarded([metrics], management_security, parts)
            port = options.metrics_port
            self.metrics = HttpListener(app, options.control_host, port, _tls(management_security))

    def named(self) -> list[tuple[str, HttpListener]]:
        """The listeners that there are."""
        every = (("business", self.business), ("management", self.management), ("metrics", self.metrics))
        return [(name, listener) for name, listener in every if listener is not None]

    async def start(self) -> None:
        """Listen. Raises StartError if a port can't be had."""
        for _, listener in self.named():
            await listener.start()

    async def close(self) -> None:
        """Stop listening."""
        await asyncio.gather(*(listener.close() for _, listener in self.named()))


def _tls(security: Security) -> ssl.SSLContext | None:
    return None if security.tls is None else security.tls.context()


def _business_routes(parts: HttpParts) -> list[Route]:
    text, chat = TextRoutes(parts.holder), ChatRoutes(parts.holder)
    completion, simple = CompletionRoutes(parts.holder), SimpleRoutes(parts.holder)

    def route(method: str, path: str, handle: Callable[..., object]) -> Route:
        return Route(path, Endpoint(handle, _door_of(path), parts.observer), methods=[method])  # type: ignore[arg-type]

    return [
        route("GET", "/", Page().page),
        route("POST", "/", text.root),
        route("POST", "/generate", text.generate),
        route("POST", "/generate_stream", text.generate_stream),
        route("POST", "/infer", text.infer),
        route("POST", "/v1/chat/completions", chat.chat),
        route("POST", "/v1/completions", completion.complete),
        route("GET", "/v1/models", simple.models),
        route("GET", "/v1/models/{name:path}", simple.model),
        route("POST", "/v1/tokenizer", simple.tokenize),
    ]


def _management_routes(parts: HttpParts, options: ServerOptions) -> list[Route]:
    routes = ManagementRoutes(parts.lifecycle, parts.holder, options, parts.request_drain)

    def route(methods: list[str], path: str, handle: Callable[..., object]) -> Route:
        return Route(path, Endpoint(handle, MINDIE, parts.observer), methods=methods)  # type: ignore[arg-type]

    return [
        route(["GET"], "/v2/health/live", routes.live),
        route(["GET"], "/v2/health/ready", routes.ready),
        route(["GET"], "/health", routes.ready),
        route(["GET"], "/info", routes.info),
        route(["GET", "POST"], "/stopService", routes.stop),
    ]


def _guarded(routes: Sequence[Route], security: Security, parts: HttpParts) -> ASGIApp:
    async def no_such_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        door = _door_of(path)
        problem = f"there is no {request.method} {path} here"
        refusal = Refusal(grpc.StatusCode.NOT_FOUND, problem)
        return Response(encode_json(door.body(refusal)), error.status_code, error.headers, "application/json")

    app = Starlette(routes=routes, exception_handlers={404: no_such_route, 405: no_such_route})
    return CallerCheck(app, security.tokens, _door_of, parts.observer)


def _door_of(path: str) -> Door:
    return OPENAI if path.startswith(OPENAI_PREFIX) and path != MINDIES_OWN else MINDIE
