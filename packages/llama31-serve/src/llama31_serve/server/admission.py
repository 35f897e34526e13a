"""Who may run, who waits, who is turned away: max_running completions run, twice as many wait, more are refused."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from types import TracebackType

import grpc

from llama31_serve.server.caller import ANONYMOUS
from llama31_serve.server.refusal import Refusal

QUEUED_PER_RUNNING = 2
RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 0.1, 30.0


class Place:
    """A request's place in the server, `size` completions large. Leaving the `with` block frees it."""

    def __init__(self, admission: Admission, size: int, tenant: str) -> None:
        self._admission = admission
        self.size = size
        self.tenant = tenant
        self.started_s: float | None = None
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Wait for a turn to run, first come first served. Raises the refusal of `refuse`."""
        self._admission.queue(self)
        await self.turn

    def refuse(self, refusal: Refusal) -> None:
        """End the wait, now or when it begins, with an error."""
        if not self.turn.done():
            self.turn.set_exception(refusal)
            self.turn.exception()  # it may never be waited for, if the request ends before that

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self)


class Admission:
    """Counts completions. Used on the event loop alone."""

    def __init__(self, max_running: int, max_per_tenant: int | None = None) -> None:
        """`max_per_tenant` completions of one tenant may run or wait; None is no limit of its own."""
        self.max_per_tenant = max_per_tenant
        self._held_by: Counter[str] = Counter()
        self.max_running = max_running
        self.max_held = max_running * (1 + QUEUED_PER_RUNNING)
        self.num_running = 0
        self.num_held = 0  # running, waiting, or still being tokenised
        self.num_refused = 0
        self._waiting: deque[Place] = deque()
        self._mean_run_s = 1.0
        self._empty = asyncio.Event()
        self._empty.set()

    def reserve(self, size: int, tenant: str = ANONYMOUS) -> Place:
        """A place for `size` completions. Raises Refusal (RESOURCE_EXHAUSTED with RetryInfo) if the server is full."""
        if self.num_held + size > self.max_held:
            raise self._refusal(
                f"the server is full: it holds {self.num_held} completions of at most {self.max_held} "
                f"({self.max_running} running)"
            )
        held = self._held_by[tenant]
        if self.max_per_tenant is not None and held + size > self.max_per_tenant:
            raise self._refusal(f"{tenant} has {held} completions here, of at most {self.max_per_tenant}")
        self.num_held += size
        self._held_by[tenant] += size
        self._empty.clear()
        return Place(self, size, tenant)

    def _refusal(self, message: str) -> Refusal:
        self.num_refused += 1
        retry_after_s = min(max(self._mean_run_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
        message = f"{message}; try again in {retry_after_s:.1f} s"
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=retry_after_s)

    def queue(self, place: Place) -> None:
        """Give a place its turn as soon as those before it have had theirs."""
        self._waiting.append(place)
        self._give_turns()

    def leave(self, place: Place) -> None:
        """See Place."""
        self.num_held -= place.size
        self._held_by[place.tenant] -= place.size
        if not self._held_by[place.tenant]:
            del self._held_by[place.tenant]
        if place.started_s is not None:
            self.num_running -= place.size
            self._mean_run_s += 0.1 * (time.monotonic() - place.started_s - self._mean_run_s)
        else:
            self._waiting = deque(waiting for waiting in self._waiting if waiting is not place)
        self._give_turns()
        if self.num_held == 0:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until nobody holds a place."""
        await self._empty.wait()

    def _give_turns(self) -> None:
        while self._waiting and self.num_running + self._waiting[0].size <= self.max_running:
            place = self._waiting.popleft()
            self.num_running += place.size
            place.started_s = time.monotonic()
            if not place.turn.done():  # cancelled or refused while it waited: its `with` block gives the turn back
                place.turn.set_result(None)
