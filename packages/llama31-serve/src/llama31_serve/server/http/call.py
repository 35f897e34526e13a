"""One HTTP request and its answer, whole or as server-sent events. A client that goes away ends the work for it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

import grpc
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from llama31_serve.server.http.refusals import Door, PayloadTooLarge
from llama31_serve.server.observer import Observer
from llama31_serve.server.refusal import Refusal

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 1024 * 1024
BODY_TIMEOUT_S = 30.0
JSON_TYPE, EVENTS_TYPE = "application/json", "text/event-stream; charset=utf-8"
Header = tuple[str, str]


class Call:
    """What a handler reads and writes. `send` waits for a slow reader."""

    def __init__(self, scope: Scope, send: Send, body: bytes) -> None:
        self.body = body
        self.headers = Headers(scope=scope)
        self.path_params: dict[str, Any] = scope.get("path_params", {})
        self.streaming = False
        self._send = send

    @property
    def request_id(self) -> str | None:
        """The id that the caller gave, in X-Request-Id."""
        return self.headers.get("x-request-id")

    async def answer(self, value: object, *, status: int = 200, headers: Sequence[Header] = ()) -> None:
        """The whole answer, as JSON."""
        await self.answer_bytes(encode_json(value), JSON_TYPE, status=status, headers=headers)

    async def answer_bytes(
        self, content: bytes, content_type: str, *, status: int = 200, headers: Sequence[Header] = ()
    ) -> None:
        """The whole answer."""
        sized = (("content-length", str(len(content))), *headers)
        await self._begin(status, content_type, sized)
        await self._send({"type": "http.response.body", "body": content})

    async def begin_stream(self, content_type: str = EVENTS_TYPE, headers: Sequence[Header] = ()) -> None:
        """Headers of an answer in pieces."""
        self.streaming = True
        await self._begin(200, content_type, (("cache-control", "no-store"), ("x-accel-buffering", "no"), *headers))

    async def event(self, value: object) -> None:
        """One server-sent event, its data in JSON."""
        await self.events((value,))

    async def events(self, values: Iterable[object]) -> None:
        """Several, sent together: a socket call costs more than an event."""
        content = b"".join(b"data: " + encode_json(value) + b"\n\n" for value in values)
        if content:
            await self.piece(content)

    async def piece(self, content: bytes) -> None:
        """Any bytes."""
        await self._send({"type": "http.response.body", "body": content, "more_body": True})

    async def end_stream(self) -> None:
        """The end of an answer in pieces."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, content_type: str, headers: Sequence[Header]) -> None:
        if self.request_id is not None:
            headers = (*headers, ("x-request-id", self.request_id))
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in (("content-type", content_type), *headers)]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


class Endpoint:
    """An ASGI application for one route: reads the body, runs the handler, says no in the words of its door."""

    def __init__(self, handle: Callable[[Call], Awaitable[None]], door: Door, observer: Observer) -> None:
        self._handle = handle
        self._door = door
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        call = Call(scope, send, b"")
        try:
            call.body = await _read_body_in_time(receive)
            await _while_connected(self._run(call), receive)
        except ConnectionError:
            return  # nobody is left to answer
        except Refusal as refusal:
            await self._refuse(call, refusal, scope["path"])
        except Exception:
            logger.exception("%s failed", scope["path"])
            problem = "the server failed on this request; its log says why"
            await self._refuse(call, Refusal(grpc.StatusCode.INTERNAL, problem), scope["path"])

    async def _run(self, call: Call) -> None:
        await self._handle(call)
        if call.streaming:
            await call.end_stream()

    async def _refuse(self, call: Call, refusal: Refusal, path: str) -> None:
        self._observer.refused(refusal.code, path)
        if call.streaming:  # the status is sent; what is left is an event that says so
            await call.event(self._door.body(refusal))
            await call.end_stream()
        else:
            await call.answer(
                self._door.body(refusal), status=self._door.status(refusal), headers=self._door.headers(refusal)
            )


def encode_json(value: object) -> bytes:
    """Compact UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def _read_body_in_time(receive: Receive) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read_body(receive)
    except TimeoutError:
        problem = f"the body did not come to its end within {BODY_TIMEOUT_S:g} s"
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, problem) from None


async def _read_body(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client went away while it sent its request")
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise PayloadTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes; shorten it")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do the work; stop it when the client goes away."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
