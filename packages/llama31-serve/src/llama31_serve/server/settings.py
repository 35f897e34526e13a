"""Everything that `llama31-serve start` needs to know, wherever it was written: flags, or MindIE's config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llama31_serve.server.listener import Security
from llama31_serve.server.options import EngineOptions, ServerOptions


@dataclass(frozen=True, slots=True)
class LogFile:
    """A log that begins anew at `max_bytes` and keeps `count` files."""

    path: Path
    max_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What to serve, where, for whom.

    Attributes:
        host_cache_bytes: host memory for what had to make room in the cache.
        tensor_parallel: processes that compute together.
        visible_devices: NPUs of this process, None for the system's choice.
        management_security: of the listeners beside the business ones; None: the same.
        notes: what of a file has no effect, and why.
    """

    model_dir: Path
    options: ServerOptions = field(default_factory=ServerOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    host_cache_bytes: int = 0
    tensor_parallel: int = 1
    visible_devices: tuple[int, ...] | None = None
    security: Security = field(default_factory=Security)
    management_security: Security | None = None
    log_level: str = "warning"
    log_file: LogFile | None = None
    notes: tuple[str, ...] = ()
