"""What the server counts: requests, tokens, times. Added to on the event loop alone, so nothing here locks.

`http/exposition.py` writes these in Prometheus' words, `status.py` in one line.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import grpc

from llama31_serve.server.observer import Observer, RequestRecord

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Counts of values up to each bound, and above the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """(bound, values up to it), as Prometheus has buckets."""
        found, total = [], 0
        for bound, count in zip((*(f"{float(bound)}" for bound in self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found


class Tallies(Observer):
    """Everything since the start."""

    def __init__(self) -> None:
        self.received_requests = 0
        self.succeeded_requests = 0
        self.failed_requests: Counter[grpc.StatusCode] = Counter()
        self.refused_calls: Counter[grpc.StatusCode] = Counter()
        self.finish_reasons: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.dropped_prompt_tokens = 0
        self.clamped_requests = 0
        self.first_token_s = Histogram(SECONDS)
        self.inter_token_s = Histogram(SECONDS)
        self.total_s = Histogram(SECONDS)
        self.queued_s = Histogram(SECONDS)
        self.prefill_s = Histogram(SECONDS)
        self.decode_s = Histogram(SECONDS)
        self.prompt_sizes = Histogram(TOKENS)
        self.completion_sizes = Histogram(TOKENS)

    def received(self, record: RequestRecord) -> None:
        """See Observer."""
        self.received_requests += 1

    def tokens(self, count: int, gap_s: float | None) -> None:
        """See Observer. Tokens that came together share the time since those before."""
        self.generated_tokens += count
        if gap_s is not None:
            self.inter_token_s.add(gap_s / count, count)

    def ended(self, record: RequestRecord) -> None:
        """See Observer."""
        if record.code is grpc.StatusCode.OK:
            self.succeeded_requests += 1
        else:
            self.failed_requests[record.code] += 1
        self.finish_reasons.update(record.finish_reasons)
        self.dropped_prompt_tokens += record.dropped_prompt_tokens
        self.clamped_requests += record.clamped
        if record.durations is None:
            return
        self.prompt_tokens += record.prompt_tokens
        self.prompt_sizes.add(record.prompt_tokens)
        self.completion_sizes.add(record.completion_tokens)
        self.queued_s.add(record.durations.queued_s)
        self.total_s.add(record.durations.total_s)
        if record.completion_tokens:
            self.prefill_s.add(record.durations.first_token_s)
            self.first_token_s.add(record.durations.queued_s + record.durations.first_token_s)
            self.decode_s.add(record.durations.decode_s)

    def refused(self, code: grpc.StatusCode, method: str) -> None:
        """See Observer."""
        self.refused_calls[code] += 1
