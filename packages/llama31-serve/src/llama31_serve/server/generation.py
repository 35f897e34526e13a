"""One request in the engine: an asynchronous iterator of what happens to its completions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.server.engine import RequestRejectedError, UnknownAdapterError
from llama31_serve.server.job import Finished, Inbox, Job, Update
from llama31_serve.server.refusal import Refusal, invalid

if TYPE_CHECKING:
    from llama31_serve.server.observer import RequestRecord


@dataclass(frozen=True, slots=True)
class Durations:
    """Where a request's time went, in seconds."""

    queued_s: float
    first_token_s: float
    decode_s: float
    total_s: float


class Generation:
    """One running request of n completions. Used on the event loop alone."""

    def __init__(
        self, request_id: str, prompt_ids: Sequence[int], jobs: Sequence[Job], inbox: Inbox, arrived_s: float
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.timed_out = False
        self.finishes: dict[int, Finished] = {}
        self.num_completion_tokens = 0
        self.jobs = jobs
        self.unfinished = {job_index for job_index, _ in enumerate(jobs)}
        self._inbox = inbox
        self._taken: deque[Update] = deque()
        self._arrived_s = arrived_s

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Update:
        """The next update, until every completion has ended. Raises Refusal if the request fails."""
        if not self.unfinished:
            raise StopAsyncIteration
        if not self._taken:
            self._taken.extend(await self._inbox.take())
        update = self._taken.popleft()
        if update.failure is not None:
            raise _refusal_of(update.failure) from update.failure
        if update.finished is not None:
            self.unfinished.discard(update.completion_index)
            self.finishes[update.completion_index] = update.finished
            self.num_completion_tokens += update.finished.completion_tokens
        return update

    def fail(self, failure: Exception) -> None:
        """End the request with an error."""
        self._inbox.put(Update(0, failure=failure), time.monotonic())

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.prompt_ids)

    def describe(self, record: RequestRecord) -> None:
        """Note how far it came."""
        record.completion_tokens = self.num_tokens_made
        record.finish_reasons = [self.finishes[index].reason for index in sorted(self.finishes)]
        record.durations = self.durations()

    @property
    def num_tokens_made(self) -> int:
        """Tokens so far, over all completions, whether they are sent yet or not."""
        return self._inbox.num_tokens

    def durations(self) -> Durations:
        """Timings of a request that has ended."""
        now_s = time.monotonic()
        started_s = min((job.started_s for job in self.jobs if job.started_s is not None), default=now_s)
        first_s = self._inbox.first_token_s or now_s
        last_s = self._inbox.last_token_s or first_s
        return Durations(started_s - self._arrived_s, first_s - started_s, last_s - first_s, last_s - self._arrived_s)


def _refusal_of(failure: Exception) -> Refusal:
    if isinstance(failure, Refusal):
        return failure
    if isinstance(failure, UnknownAdapterError):
        return Refusal(grpc.StatusCode.NOT_FOUND, f"{failure}; load it first, or ask for none")
    if isinstance(failure, RequestRejectedError):
        return invalid([FieldViolation("request", str(failure))])
    return Refusal(grpc.StatusCode.INTERNAL, f"the engine failed on this request ({type(failure).__name__})")
