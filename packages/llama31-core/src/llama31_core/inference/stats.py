"""Counters of an engine, for logs and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds now, and counters since it was made.

    Attributes:
        num_waiting, num_running: sequences.
        num_free_blocks, num_free_host_blocks: blocks that nobody owns.
        num_preemptions: times that a sequence made room; `num_swapped_out` of them went to the host, of which
            `num_swapped_in` have come back; the others are computed again.
        num_prefill_tokens: tokens of sequences that entered the cache; `num_prefix_hit_tokens` of them were there.
        num_drafted_tokens: tokens guessed; `num_accepted_tokens` of them were right.
        num_failed_requests: requests that ended with an error.
        num_failed_passes_in_a_row: forward passes that failed since the last one that did not; when it keeps growing,
            the device and not a request is at fault.
    """

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_free_host_blocks: int
    num_preemptions: int
    num_swapped_out: int
    num_swapped_in: int
    num_prefill_tokens: int
    num_prefix_hit_tokens: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_failed_requests: int
    num_failed_passes_in_a_row: int

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the tokens to prefill that were found in the cache."""
        return self.num_prefix_hit_tokens / max(1, self.num_prefill_tokens)

    @property
    def acceptance_rate(self) -> float:
        """Share of the guessed tokens that were right."""
        return self.num_accepted_tokens / max(1, self.num_drafted_tokens)
