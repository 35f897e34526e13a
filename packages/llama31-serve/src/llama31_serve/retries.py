"""When a call that no server has begun to answer is made again: gRPC's rule for unary calls, and ours for streams."""

from __future__ import annotations

import random
import time

import grpc

from llama31_serve.errors import CancelledError, RpcError

INITIAL_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
BACKOFF_MULTIPLIER = 2
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


def retry_policy(max_attempts: int) -> dict[str, object]:
    """The `retryPolicy` of a gRPC service config, for at most `max_attempts` (2 to 5) attempts."""
    return {
        "maxAttempts": max_attempts,
        "initialBackoff": f"{INITIAL_BACKOFF_S}s",
        "maxBackoff": f"{MAX_BACKOFF_S}s",
        "backoffMultiplier": BACKOFF_MULTIPLIER,
        "retryableStatusCodes": [code.name for code in RETRYABLE],
    }


class StreamAttempts:
    """The attempts of one stream within its deadline, by the same rule as `retry_policy`.

    gRPC's own retries are not used for streams: in grpcio 1.85.1 one that is refused again after a retry has its
    status, but the read that waits for its next message never ends, not even at the deadline. The retries that gRPC
    makes without any policy, of a stream that the server never saw because it was going, do the same.
    """

    def __init__(self, max_attempts: int, timeout_s: float | None) -> None:
        self._num_left = max_attempts
        self._backoff_s = INITIAL_BACKOFF_S
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def begin(self) -> float | None:
        """Count an attempt; the seconds that are left for it, None without a deadline."""
        self._num_left -= 1
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def answered(self) -> None:
        """The server has begun to answer: nothing is repeated any more."""
        self._num_left = 0

    def pause_s(self, error: RpcError) -> float:
        """Seconds until the next attempt. Raises `error` if there is none, or none before the deadline."""
        if self._num_left <= 0 or error.code not in RETRYABLE:
            raise error
        pause_s = error.retry_after_s
        if pause_s is None:
            pause_s = self._backoff_s * random.uniform(0.8, 1.2)  # many clients are refused together
            self._backoff_s = min(self._backoff_s * BACKOFF_MULTIPLIER, MAX_BACKOFF_S)
        if self._deadline_s is not None and time.monotonic() + pause_s >= self._deadline_s:
            raise error
        return pause_s


def stream_cancelled() -> CancelledError:
    """The error of a stream that its own side cancelled."""
    return CancelledError(grpc.StatusCode.CANCELLED, "the stream was cancelled here")
