"""From a checked request to a running generation: place, prompt tokens, jobs, and, whatever happens, their end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.server.admission import Admission
from llama31_serve.server.engine import Sampling
from llama31_serve.server.engine_thread import EngineThread
from llama31_serve.server.generation import Generation
from llama31_serve.server.job import Inbox, Job, TextStream
from llama31_serve.server.lifecycle import Lifecycle
from llama31_serve.server.open_requests import OpenRequest, OpenRequests
from llama31_serve.server.refusal import Refusal, invalid
from llama31_serve.server.stop_strings import StopStringMatcher
from llama31_serve.server.text import TextWorker
from llama31_serve.server.validation import ConversationInput, GenerationRequest, Limits

SEED_MODULUS = 2**64


class Generator:
    """Opens generations. Used on the event loop alone."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        admission: Admission,
        requests: OpenRequests,
        text: TextWorker,
        engine: EngineThread,
        limits: Limits,
    ) -> None:
        self.limits = limits
        self._lifecycle = lifecycle
        self._admission = admission
        self._requests = requests
        self._text = text
        self._engine = engine

    @asynccontextmanager
    async def open(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """A generation whose jobs are in the engine. Leaving the block takes them out, if they have not ended.

        Raises:
            Refusal: not serving, full, id in use, prompt too long or not allowed, ended while it waited.
        """
        self._lifecycle.require_serving()
        self._requests.require_free(request.request_id)
        with self._admission.reserve(request.n) as place:
            entry = self._requests.add(request.request_id, place)
            try:
                entry.generation = generation = await self._begin(request, entry)
                try:
                    for job in generation.jobs:
                        self._engine.submit(job)
                    yield generation
                finally:
                    for index in generation.unfinished:
                        self._engine.abort(generation.jobs[index].engine_id)
            finally:
                finished = entry.generation is not None and not entry.generation.unfinished
                self._requests.remove(entry, finished=finished)

    def abort(self, request_id: str) -> bool:
        """End an open request with what it has so far; False if there is none of this id."""
        entry = self._requests.get(request_id)
        if entry is None:
            return False
        if entry.generation is None:
            entry.fail(Refusal(grpc.StatusCode.ABORTED, "the request was aborted before it had begun"))
        else:
            for index in entry.generation.unfinished:
                self._engine.abort(entry.generation.jobs[index].engine_id, tell=True)
        return True

    async def _begin(self, request: GenerationRequest, entry: OpenRequest) -> Generation:
        prompt_ids = await self._text.encode(request.prompt)
        max_tokens = self._max_tokens(request, len(prompt_ids))
        await entry.place.start()
        inbox = Inbox()
        jobs = [self._job(request, index, prompt_ids, max_tokens, inbox) for index in range(request.n)]
        return Generation(request.request_id, len(prompt_ids), jobs, inbox, entry.arrived_s)

    def _max_tokens(self, request: GenerationRequest, num_prompt_tokens: int) -> int:
        limit = self.limits.max_seq_len
        room = limit - num_prompt_tokens
        if room < 1:
            problem = (
                f"has {num_prompt_tokens} tokens, the context holds {limit} with at least one to generate; shorten it"
            )
            raise invalid([FieldViolation("input", problem)])
        if request.max_tokens is None:
            return min(self.limits.default_max_tokens, room)
        if request.max_tokens > room:
            problem = (
                f"is {request.max_tokens}, but after a prompt of {num_prompt_tokens} tokens the context of {limit} "
                f"has room for {room}; lower it or leave it unset"
            )
            raise invalid([FieldViolation("stopping.max_tokens", problem)])
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
