"""Who calls over HTTP: bearer token and trace context, looked at before anything else of a request."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llama31_serve.server.caller import ANONYMOUS, CALLER, Caller
from llama31_serve.server.http.call import Call
from llama31_serve.server.http.refusals import Door
from llama31_serve.server.observer import Observer
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.token_auth import Token, tenant_of

OPEN_PATHS = frozenset({("GET", "/"), ("GET", "/health"), ("GET", "/v2/health/live"), ("GET", "/v2/health/ready")})


class CallerCheck:
    """Refuses whoever has none of the tokens; the page and health are for everyone."""

    def __init__(
        self, app: ASGIApp, tokens: tuple[Token, ...], door_of: Callable[[str], Door], observer: Observer
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._door_of = door_of
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        tenant = tenant_of(headers.get("authorization", ""), self._tokens)
        if tenant is None and (scope["method"], path) not in OPEN_PATHS:
            refusal = Refusal(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")
            self._observer.refused(refusal.code, path)
            door = self._door_of(path)
            call = Call(scope, send, b"")
            await call.answer(door.body(refusal), status=door.status(refusal), headers=door.headers(refusal))
            return
        CALLER.set(Caller(tenant or ANONYMOUS, path, headers.get("traceparent", "")))
        await self._app(scope, receive, send)
