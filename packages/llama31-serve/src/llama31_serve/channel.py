"""How the clients reach a server: target, TLS, token, load balancing and retries, as gRPC channel options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

from llama31_serve.retries import retry_policy
from llama31_serve.stubs import inference_pb2

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. Without `ca` the system's authorities are trusted; `cert` and `key` together are mutual TLS.

    `server_name` is checked against the certificate instead of the target's host.
    """

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("Tls: cert and key belong together; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """The files, read."""
        ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


def channel_options(tls: Tls | None, max_attempts: int) -> list[tuple[str, str | int]]:
    """Options of a channel.

    Calls go round all addresses that a `dns:///` target resolves to. A unary call that no server has begun to answer
    (UNAVAILABLE, RESOURCE_EXHAUSTED) is tried again up to `max_attempts` times in all, with exponential backoff or
    after the time that the server names; of streams `StreamAttempts` takes care.
    """
    if not 1 <= max_attempts <= 5:
        raise ValueError(f"max_attempts is {max_attempts}, allowed are 1 (never try again) to 5 (gRPC's own limit)")
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    unary = [method.name for method in service.methods if not method.server_streaming]
    method_config: list[dict[str, object]] = []
    if max_attempts > 1:
        names = [{"service": service.full_name, "method": name} for name in unary]
        method_config.append({"name": names, "retryPolicy": retry_policy(max_attempts)})
    service_config = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": method_config}
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def open_channel(target: str, tls: Tls | None, max_attempts: int) -> grpc.Channel:
    """A blocking channel. Raises OSError if a TLS file can't be read."""
    options = channel_options(tls, max_attempts)
    if tls is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, tls.credentials(), options)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
