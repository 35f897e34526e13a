"""Bearer tokens: whoever has none of them is told UNAUTHENTICATED, on every call but health."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from llama31_serve.errors import StartError
from llama31_serve.server.caller import ANONYMOUS, CALLER, Caller

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

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata)
        tenant = tenant_of(str(metadata.get("authorization", "")), self._tokens)
        handler = await continuation(handler_call_details)
        if tenant is None and not method.startswith(HEALTH_PREFIX):
            return None if handler is None else _refusing(handler)
        CALLER.set(Caller(tenant or ANONYMOUS, method, str(metadata.get("traceparent", ""))))
        return handler


def _refusing(handler: Any) -> Any:
    """A handler of the same kind that refuses."""

    async def refuse(request: Any, context: Any) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")
        raise AssertionError("abort raises")

    wrap = _WRAP[handler.request_streaming, handler.response_streaming]
    return wrap(refuse, handler.request_deserializer, handler.response_serializer)
