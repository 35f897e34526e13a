"""Bearer tokens: whoever has none of them is told UNAUTHENTICATED, on every call but health."""

from __future__ import annotations

import hmac
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from llama31_serve.errors import StartError
from llama31_serve.server.caller import ANONYMOUS, CALLER, Caller
from llama31_serve.server.observer import Observer
from llama31_serve.server.peer_check import PeerCheck

HEALTH_PREFIX = "/grpc.health.v1.Health/"
_WRAP = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token and the tenant who has it."""

    secret: bytes
    tenant: str = ANONYMOUS


def load_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens in a file, one a line, `tenant token` or a token alone; a tenant may have several, old and new.

    Raises StartError if there is none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--token_file {path}: cannot be read ({error})") from error
    tokens = []
    for line in lines:
        *tenant, secret = line.split() or [""]
        if secret:
            tokens.append(Token(secret.encode(), " ".join(tenant) or ANONYMOUS))
    if not tokens:
        raise StartError(f"--token_file {path}: holds no token; write one a line")
    return tuple(tokens)


def tenant_of(authorization: str, tokens: tuple[Token, ...]) -> str | None:
    """Who sends this `authorization` header; None if nobody does. Without tokens everybody may.

    Every token is compared, each in constant time: the time taken tells nothing of any of them.
    """
    if not tokens:
        return ANONYMOUS
    scheme, _, given = authorization.partition(" ")
    found = [token.tenant for token in tokens if hmac.compare_digest(given.strip().encode(), token.secret)]
    return found[0] if found and scheme.lower() == "bearer" else None


class CallerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Finds out who calls, for everything that this call does, and refuses whoever has none of the tokens."""

    def __init__(self, tokens: tuple[Token, ...], peers: PeerCheck | None, observer: Observer) -> None:
        """`peers`: whose client certificates are taken, if not all that are signed; `observer` hears of the others."""
        self._tokens = tokens
        self._peers = peers
        self._observer = observer

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata)
        tenant = tenant_of(str(metadata.get("authorization", "")), self._tokens)
        handler = await continuation(handler_call_details)
        CALLER.set(Caller(tenant or ANONYMOUS, method, str(metadata.get("traceparent", ""))))
        if handler is None:
            return None
        if tenant is None and not method.startswith(HEALTH_PREFIX):
            return _refusing(handler, self._refuse)
        return handler if self._peers is None else _checking(handler, self._peers, self._refuse)

    async def _refuse(self, context: Any, problem: str) -> NoReturn:
        self._observer.refused(grpc.StatusCode.UNAUTHENTICATED, CALLER.get().method)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, problem)
        raise AssertionError("abort raises")


Refuse = Callable[[Any, str], Awaitable[NoReturn]]


def _checking(handler: Any, peers: PeerCheck, refuse: Refuse) -> Any:
    """The same handler behind a look at the client's certificate."""
    streams = handler.request_streaming, handler.response_streaming
    behaviour = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)[
        2 * streams[0] + streams[1]
    ]

    async def check(context: Any) -> None:
        shown = context.auth_context().get("x509_pem_cert")
        problem = peers.problem_of_pem(shown[0]) if shown else "the client has no certificate"
        if problem is not None:
            await refuse(context, problem)

    async def answer(request: Any, context: Any) -> Any:
        await check(context)
        return await behaviour(request, context)

    async def generate(request: Any, context: Any) -> Any:
        await check(context)
        async for response in behaviour(request, context):
            yield response

    checked = generate if inspect.isasyncgenfunction(behaviour) else answer
    return _WRAP[streams](checked, handler.request_deserializer, handler.response_serializer)


def _refusing(handler: Any, refuse: Refuse) -> Any:
    """A handler of the same kind that refuses."""

    async def answer(request: Any, context: Any) -> NoReturn:
        await refuse(context, "the bearer token is missing or wrong")

    wrap = _WRAP[handler.request_streaming, handler.response_streaming]
    return wrap(answer, handler.request_deserializer, handler.response_serializer)
