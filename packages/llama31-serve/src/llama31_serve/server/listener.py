"""A gRPC server on one address: the options, TLS and token check that every listener of this process shares."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from llama31_serve.errors import StartError
from llama31_serve.server.observer import Observer
from llama31_serve.server.options import check_address, join_address
from llama31_serve.server.tls import ServerTls
from llama31_serve.server.token_auth import CallerInterceptor, Token

CLOSE_GRACE_S = 1.0
GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),  # a client that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
)


@dataclass(frozen=True, slots=True)
class Security:
    """Who may call. None and empty: anyone who reaches the port."""

    tls: ServerTls | None = None
    tokens: tuple[Token, ...] = ()


class Listener:
    """Add servicers to `grpc`, then `start`. `observer` hears of callers that are not let in."""

    def __init__(self, host: str, port: int, security: Security, observer: Observer) -> None:
        peers = None if security.tls is None or not security.tls.peers else security.tls.peers
        interceptor = CallerInterceptor(security.tokens, peers, observer)
        self.grpc = grpc.aio.server(options=GRPC_OPTIONS, interceptors=[interceptor])
        self._credentials = None if security.tls is None else security.tls.credentials()
        self._host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port that clients connect to, known after `start`."""
        return join_address(self._host, self.port)

    async def start(self) -> None:
        """Listen. Raises StartError if the address can't be had."""
        check_address(self._host, self.port)  # gRPC does not say why it can't
        try:
            if self._credentials is None:
                self.port = self.grpc.add_insecure_port(self.address)
            else:
                self.port = self.grpc.add_secure_port(self.address, self._credentials)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {self.address}; choose another address") from error
        await self.grpc.start()

    async def close(self) -> None:
        """Stop listening; calls that still run get a moment."""
        await self.grpc.stop(CLOSE_GRACE_S)
