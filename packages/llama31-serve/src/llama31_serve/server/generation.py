"""From a checked request to its updates: place, prompt tokens, jobs, and, whatever happens, their end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.server.admission import Admission
from llama31_serve.server.engine import RequestRejectedError, Sampling
from llama31_serve.server.engine_thread import EngineThread
from llama31_serve.server.job import Inbox, Job, TextStream, Update
from llama31_serve.server.lifecycle import Lifecycle
from llama31_serve.server.refusal import Refusal, invalid
from llama31_serve.server.stop_strings import StopStringMatcher
from llama31_serve.server.text import TextWorker
from llama31_serve.server.validation import ConversationInput, GenerationRequest, Limits

SEED_MODULUS = 2**64


@dataclass(frozen=True, slots=True)
class Durations:
    """Where a request's time went, in seconds."""

    queued_s: float
    first_token_s: float
    decode_s: float
    total_s: float


class Generation:
    """One running request of n completions: an asynchronous iterator of its updates."""

    def __init__(
        self, request_id: str, num_prompt_tokens: int, jobs: Sequence[Job], inbox: Inbox, arrived_s: float
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
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
            self.num_completion_tokens += update.finished.completion_tokens
        return update

    def fail(self, failure: Exception) -> None:
        """End the request with an error."""
        self._inbox.put(Update(0, failure=failure), time.monotonic())

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
    if isinstance(failure, RequestRejectedError):
        return invalid([FieldViolation("request", str(failure))])
    return Refusal(grpc.StatusCode.INTERNAL, f"the engine failed on this request ({type(failure).__name__})")


class Generator:
    """Opens generations and knows those that are open. Used on the event loop alone."""

    def __init__(
        self, lifecycle: Lifecycle, admission: Admission, text: TextWorker, engine: EngineThread, limits: Limits
    ) -> None:
        self.limits = limits
        self._lifecycle = lifecycle
        self._admission = admission
        self._text = text
        self._engine = engine
        self._open: dict[str, Generation | None] = {}

    @asynccontextmanager
    async def open(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """A generation whose jobs are in the engine. Leaving the block takes them out, if they have not ended.

        Raises:
            Refusal: not serving, full, id in use, prompt too long or not allowed.
        """
        arrived_s = time.monotonic()
        self._lifecycle.require_serving()
        if request.request_id in self._open:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id {request.request_id!r} belongs to a request that is still running; choose another",
            )
        with self._admission.reserve(request.n) as place:
            self._open[request.request_id] = None
            try:
                prompt_ids = await self._text.encode(request.prompt)
                max_tokens = self._max_tokens(request, len(prompt_ids))
                await place.start()
                inbox = Inbox()
                jobs = [self._job(request, index, prompt_ids, max_tokens, inbox) for index in range(request.n)]
                generation = Generation(request.request_id, len(prompt_ids), jobs, inbox, arrived_s)
                self._open[request.request_id] = generation
                try:
                    for job in jobs:
                        self._engine.submit(job)
                    yield generation
                finally:
                    for index in generation.unfinished:
                        self._engine.abort(jobs[index].engine_id)
            finally:
                del self._open[request.request_id]

    def abort(self, request_id: str) -> bool:
        """End a running request with what it has so far; False if there is none that runs under this id."""
        generation = self._open.get(request_id)
        if generation is None:
            return False
        for index in generation.unfinished:
            self._engine.abort(generation.jobs[index].engine_id, tell=True)
        return True

    def fail_all(self, failure: Exception) -> int:
        """End every running request with an error; how many there were."""
        running = [generation for generation in self._open.values() if generation is not None]
        for generation in running:
            generation.fail(failure)
        return len(running)

    def _max_tokens(self, request: GenerationRequest, num_prompt_tokens: int) -> int:
        room = self.limits.max_seq_len - num_prompt_tokens
        if room < 1:
            raise invalid(
                [
                    FieldViolation(
                        "input",
                        f"has {num_prompt_tokens} tokens, but the context holds {self.limits.max_seq_len} "
                        "with at least one to generate; shorten it",
                    )
                ]
            )
        if request.max_tokens is None:
            return min(self.limits.default_max_tokens, room)
        if request.max_tokens > room:
            raise invalid(
                [
                    FieldViolation(
                        "stopping.max_tokens",
                        f"is {request.max_tokens}, but after a prompt of {num_prompt_tokens} tokens the context of "
                        f"{self.limits.max_seq_len} has room for {room}; lower it or leave it unset",
                    )
                ]
            )
        return request.max_tokens

    def _stop_token_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        """A conversation also ends at the tokenizer's end-of-turn tokens, of which the model's config may not know."""
        if isinstance(request.prompt, ConversationInput) and not request.ignore_eos:
            return (*request.stop_token_ids, *self._text.model.tokenizer.stop_ids)
        return request.stop_token_ids

    def _job(
        self, request: GenerationRequest, index: int, prompt_ids: Sequence[int], max_tokens: int, inbox: Inbox
    ) -> Job:
        seed = None if request.seed is None else (request.seed + index) % SEED_MODULUS
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=seed,
            stop_token_ids=self._stop_token_ids(request),
            ignore_eos=request.ignore_eos,
        )
        decoder = self._text.model.stream_decoder(not request.include_special_tokens)
        matcher = StopStringMatcher(request.stop_strings, include_stop_string=request.include_stop_string)
        return Job(f"{request.request_id}#{index}", prompt_ids, sampling, TextStream(index, decoder, matcher), inbox)
