"""One JSON object for each request that has ended, and for each call that was refused. No user's text is in it."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import grpc

from llama31_serve.server.caller import CALLER
from llama31_serve.server.observer import Observer, RequestRecord

logger = logging.getLogger(__name__)


class AccessLog(Observer):
    """Writes to this module's logger, at INFO."""

    def ended(self, record: RequestRecord) -> None:
        """See Observer."""
        if not logger.isEnabledFor(logging.INFO):
            return
        entry: dict[str, Any] = {
            "request_id": record.request_id,
            "tenant": record.caller.tenant,
            "method": record.caller.method,
            "code": record.code.name,
            "n": record.n,
            "prompt_tokens": record.prompt_tokens,
            "dropped_prompt_tokens": record.dropped_prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "finish_reasons": record.finish_reasons,
            "clamped": record.clamped,
        }
        if record.caller.traceparent:
            entry["traceparent"] = record.caller.traceparent
        if record.durations is not None:
            for name in ("queued", "first_token", "decode", "total"):
                entry[f"{name}_ms"] = round(getattr(record.durations, f"{name}_s") * 1e3, 2)
        self._write(record.arrived_at, entry)

    def refused(self, code: grpc.StatusCode, method: str) -> None:
        """See Observer."""
        if logger.isEnabledFor(logging.INFO):
            caller = CALLER.get()
            entry = {"tenant": caller.tenant, "method": caller.method or method, "code": code.name, "refused": True}
            self._write(time.time(), entry)

    def _write(self, arrived_at: float, entry: dict[str, Any]) -> None:
        logger.info("%s", json.dumps({"arrived_at": round(arrived_at, 3), **entry}, ensure_ascii=True))
