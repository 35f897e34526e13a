"""Bearer tokens: whoever has none of them is told UNAUTHENTICATED, on every call but health."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc

from llama31_serve.errors import StartError

HEALTH_PREFIX = "/grpc.health.v1.Health/"
_WRAP = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


def load_tokens(path: Path) -> tuple[bytes, ...]:
    """The tokens in a file, one a line, so that an old and a new one can both hold. Raises StartError if none is."""
    try:
        tokens = tuple(line.strip().encode() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--token_file {path}: cannot be read ({error})") from error
    if not tokens:
        raise StartError(f"--token_file {path}: holds no token; write one a line")
    return tokens


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets calls through that carry one of the tokens as `authorization: Bearer …`."""

    def __init__(self, tokens: tuple[bytes, ...]) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        if handler_call_details.method.startswith(HEALTH_PREFIX) or self._allows(handler_call_details):
            return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)
        return None if handler is None else _refusing(handler)

    def _allows(self, details: Any) -> bool:
        given = dict(details.invocation_metadata).get("authorization", "")
        scheme, _, token = given.partition(" ")
        # Every token is compared, each in constant time: the time taken tells nothing of any of them.
        equal = [hmac.compare_digest(token.strip().encode(), valid) for valid in self._tokens]
        return scheme.lower() == "bearer" and any(equal)


def _refusing(handler: Any) -> Any:
    """A handler of the same kind that refuses."""

    async def refuse(request: Any, context: Any) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")
        raise AssertionError("abort raises")

    wrap = _WRAP[handler.request_streaming, handler.response_streaming]
    return wrap(refuse, handler.request_deserializer, handler.response_serializer)
