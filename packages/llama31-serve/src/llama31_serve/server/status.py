"""The server in numbers at this moment: one line every few seconds while there is something to tell."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from llama31_serve.server.admission import Admission
from llama31_serve.server.engine_thread import EngineThread
from llama31_serve.server.tallies import Tallies

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second over the last period: computed of prompts, and generated."""

    prompt: float = 0.0
    generated: float = 0.0


class Status:
    """Gauges, and the task that measures rates and logs the line."""

    def __init__(self, tallies: Tallies, admission: Admission, engine: EngineThread, period_s: float) -> None:
        self.tallies = tallies
        self.admission = admission
        self.rates = Rates()
        self._engine = engine
        self._period_s = period_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; a period of 0 is never."""
        if self._period_s > 0:
            self._task = asyncio.create_task(self._watch(), name="llama31-status")

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def num_waiting(self) -> int:
        """Completions that were accepted and do not run: in the server's queue or the engine's."""
        return self.admission.num_held - self.admission.num_running + self._engine.stats.num_waiting

    @property
    def num_running(self) -> int:
        """Completions that the engine computes."""
        return self._engine.stats.num_running

    @property
    def num_swapped(self) -> int:
        """Completions whose cache is on the host."""
        return max(0, self._engine.stats.num_swapped_out - self._engine.stats.num_swapped_in)

    @property
    def cache_usage(self) -> float:
        """Share of the device's cache blocks that somebody owns."""
        stats = self._engine.stats
        return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0

    @property
    def host_cache_usage(self) -> float:
        """The same of the host's."""
        stats = self._engine.stats
        return 1 - stats.num_free_host_blocks / stats.num_host_blocks if stats.num_host_blocks else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that were found in the cache."""
        return self._engine.stats.num_prefix_hit_tokens / max(1, self._engine.stats.num_prefill_tokens)

    @property
    def engine_counters(self) -> dict[str, int]:
        """Counters of the engine that metrics tell too."""
        stats = self._engine.stats
        return {
            "preemptions": stats.num_preemptions,
            "prefill_tokens": stats.num_prefill_tokens,
            "prefix_hit_tokens": stats.num_prefix_hit_tokens,
            "drafted_tokens": stats.num_drafted_tokens,
            "accepted_tokens": stats.num_accepted_tokens,
        }

    def line(self) -> str:
        """The line."""
        refused = sum(self.tallies.refused_calls.values())
        return (
            f"running {self.num_running}, waiting {self.num_waiting}, generating {self.rates.generated:.1f} tokens/s, "
            f"prompts {self.rates.prompt:.1f} tokens/s, KV cache {self.cache_usage:.0%}, prefix hits "
            f"{self.prefix_hit_rate:.0%}, preempted {self._engine.stats.num_preemptions}, finished "
            f"{self.tallies.succeeded_requests}, failed {sum(self.tallies.failed_requests.values())}, refused {refused}"
        )

    async def _watch(self) -> None:
        before_s, prompt, generated, was_busy = time.monotonic(), 0, 0, False
        while True:
            await asyncio.sleep(self._period_s)
            now_s, stats = time.monotonic(), self._engine.stats
            made, read = self.tallies.generated_tokens, stats.num_prefill_tokens
            elapsed_s = now_s - before_s
            self.rates = Rates((read - prompt) / elapsed_s, (made - generated) / elapsed_s)
            busy = made > generated or self.admission.num_held > 0
            if busy or was_busy:
                logger.info("%s", self.line())
            before_s, prompt, generated, was_busy = now_s, read, made, busy
