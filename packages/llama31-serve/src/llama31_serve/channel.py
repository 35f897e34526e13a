"""How the clients reach a server: target, TLS, token, load balancing and retries, as gRPC channel options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc

from llama31_serve.retries import retry_policy
from llama31_serve.stubs import inference_pb2

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
Options = list[tuple[str, str | int]]
_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]


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


def unary_options(target: str, tls: Tls | None, max_attempts: int) -> Options:
    """Options of a channel for calls with one answer.

    Calls go round all addresses that a `dns:///` target resolves to or an `ipv4:` one lists, past those whose health
    is not SERVING: attempts in turn could all meet the one that drains or loads. Of a plain "host:port" no health is
    watched, so that the server itself says why it refuses. A call that no server has begun to answer (UNAVAILABLE,
    RESOURCE_EXHAUSTED) is tried again up to `max_attempts` times in all, with exponential backoff or after the time
    that the server names.
    """
    if not 1 <= max_attempts <= 5:
        raise ValueError(f"max_attempts is {max_attempts}, allowed are 1 (never try again) to 5 (gRPC's own limit)")
    method_config: list[dict[str, object]] = []
    if max_attempts > 1:
        unary = [method.name for method in _SERVICE.methods if not method.server_streaming]
        names = [{"service": _SERVICE.full_name, "method": name} for name in unary]
        method_config.append({"name": names, "retryPolicy": retry_policy(max_attempts)})
    return plain_options(tls, {"methodConfig": method_config, **_watched_health(target)})


def stream_options(target: str, tls: Tls | None) -> Options:
    """The same for streams. gRPC repeats none of them, not even unseen: `StreamAttempts` does, and says why."""
    return [*plain_options(tls, _watched_health(target)), ("grpc.enable_retries", 0)]


def plain_options(tls: Tls | None, service_config: Mapping[str, object] = MappingProxyType({})) -> Options:
    """Options of a channel that reaches a server in whatever state it is."""
    service_config = {"loadBalancingConfig": [{"round_robin": {}}], **service_config}
    options: Options = [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _watched_health(target: str) -> dict[str, object]:
    several = "," in target or "://" in target or target.startswith("dns:")
    return {"healthCheckConfig": {"serviceName": _SERVICE.full_name}} if several else {}


def open_channel(target: str, tls: Tls | None, options: Options) -> grpc.Channel:
    """A blocking channel. Raises OSError if a TLS file can't be read."""
    if tls is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, tls.credentials(), options)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
