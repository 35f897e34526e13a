"""What an operator can set, checked before a port is bound or a weight is read."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from llama31_serve.errors import StartError

PORTS = ("port", "control_port", "http_port", "management_port", "metrics_port")
COUNTS = (
    "max_running",
    "max_per_tenant",
    "default_max_tokens",
    "max_prompt_tokens",
    "max_new_tokens",
    "tokenizer_threads",
)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Passed on to the engine; None leaves the choice to it."""

    max_seq_len: int | None = None
    max_batch_size: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    cache_memory_bytes: int | None = None
    kv_cache_dtype: str | None = None
    num_host_blocks: int | None = None
    max_prefill_tokens: int | None = None
    max_prefill_batch_size: int | None = None
    max_queue_delay_s: float | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen, how much to take on, how long to wait at the end.

    Attributes:
        max_running: completions handed to the engine at once; twice as many wait, more are refused.
        max_per_tenant: completions of one tenant (a named bearer token) that may run or wait.
        default_max_tokens: for requests that do not say.
        max_prompt_tokens: longer prompts are refused, or cut at their beginning with `truncate_prompts`.
        max_new_tokens: most tokens of a completion.
        tokenizer_threads: how many texts are tokenised at once.
        status_period_s: how often a line about a busy server is logged, 0 for never.
        drain_timeout_s: how long running requests may take after SIGTERM.
        control_host, control_port: listener of ControlService; none if the port is None.
        http_port: HTTP at `host`, management_port: HTTP's management at `control_host`, metrics_port: /metrics there;
            none if the port is None. The management has /metrics too.
        allow_special_tokens: callers may write control tokens into text.
        allow_any_address: listening on 0.0.0.0 or :: is meant.
        engine, device_type, model_dtype: what the engine was asked for, runs on and computes in, for GET /info.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    model_name: str = "model"
    max_running: int = 64
    max_per_tenant: int | None = None
    default_max_tokens: int = 512
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    truncate_prompts: bool = False
    tokenizer_threads: int = 2
    drain_timeout_s: float = 30.0
    status_period_s: float = 5.0
    control_host: str = "127.0.0.1"
    control_port: int | None = None
    http_port: int | None = None
    management_port: int | None = None
    metrics_port: int | None = None
    allow_special_tokens: bool = False
    allow_any_address: bool = False
    engine: EngineOptions = EngineOptions()
    device_type: str | None = None
    model_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in PORTS:
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise StartError(f"--{name} is {port}, allowed are 0 (any free one) to 65535")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StartError(f"--{name} is {value}, allowed are numbers from 1 up")
        if not self.model_name:
            raise StartError("--model_name is empty; give a name, or leave it out for the directory's")
        for name in ("drain_timeout_s", "status_period_s"):
            if not getattr(self, name) >= 0:
                raise StartError(f"--{name} is {getattr(self, name)}, allowed are numbers from 0 up")
        for name, host in (("host", self.host), ("control_host", self.control_host)):
            if not self.allow_any_address and is_any_address(host):
                raise StartError(
                    f"--{name} {host} listens on every interface; name one address, or add --allow_any_address"
                )


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_any_address(host: str) -> bool:
    """Whether this is no address of a machine but all of them."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def check_address(host: str, port: int) -> None:
    """Raises StartError, with the system's reason, unless a socket can be bound there now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind(address)
    except OSError as error:
        where = join_address(host, port)
        raise StartError(f"cannot listen on {where}: {error.strerror}; choose another address or port") from error


def check_model_dir(path: Path) -> None:
    """Raises StartError unless `path` looks like a model directory."""
    if not path.exists():
        raise StartError(
            f"--model {path}: no such directory; give a model directory, as llama31-ckpt convert writes it"
        )
    if not path.is_dir():
        raise StartError(f"--model {path}: is a file; give the model directory, as llama31-ckpt convert writes it")
    if not (path / "config.json").is_file():
        raise StartError(
            f"--model {path}: has no config.json; give a model directory, as llama31-ckpt convert writes it"
        )
    if not any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise StartError(f"--model {path}: has neither tokenizer.model nor tokenizer.json")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.ckpt")):
        raise StartError(f"--model {path}: has no weights (*.safetensors or *.ckpt)")
