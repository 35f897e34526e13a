"""An ASGI application on one address, served by uvicorn on the loop that everything else runs on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama31_serve.errors import StartError
from llama31_serve.server.options import join_address

CLOSE_GRACE_S = 1
BACKLOG = 512
KEEP_ALIVE_S = 20  # between two requests of a connection; less than the patience below
REQUEST_TIMEOUT_S = 30.0  # for the headers of a request; call.py has the same patience with its body
UNREAD_TIMEOUT_S = 60.0  # a client that takes nothing for so long is cut off
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class _Protocol(H11Protocol):
    """A connection that is closed if it asks for nothing, or never comes to the end of its headers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(REQUEST_TIMEOUT_S, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        cycle = self.cycle
        if cycle is before and (cycle is None or cycle.response_complete):
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(REQUEST_TIMEOUT_S, self._look, cycle)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the whole process, and whoever runs it has them already."""
        yield


class HttpListener:
    """`start`, then `close`."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host = host
        self.port = port
        self._tls = tls
        config = uvicorn.Config(
            app,
            http=_Protocol,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_GRACE_S,
        )
        config.load()
        config.ssl = tls
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port, known after `start`."""
        return join_address(self._host, self.port)

    @property
    def url(self) -> str:
        """What a browser is given."""
        return f"{'http' if self._tls is None else 'https'}://{self.address}"

    async def start(self) -> None:
        """Listen. Raises StartError, with the system's reason, if the address can't be had."""
        listening = self._bind()
        self.port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listening]), name="llama31-http")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            self._task.result()

    async def close(self) -> None:
        """Stop listening; requests that still run get a moment."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task

    def _bind(self) -> socket.socket:
        try:
            found = socket.getaddrinfo(self._host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listening = socket.socket(family, kind, protocol)
            try:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Connections take these over: one whose other end is gone, or does not read, does not stay.
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_TIMEOUT_S * 1e3))
                for option, value in _KEEPALIVE:
                    listening.setsockopt(socket.IPPROTO_TCP, option, value)
                listening.bind(address)
                listening.listen(BACKLOG)
                listening.setblocking(False)
            except OSError:
                listening.close()
                raise
        except OSError as error:
            problem = f"cannot listen on {self.address}: {error.strerror}; choose another address or port"
            raise StartError(problem) from error
        return listening
