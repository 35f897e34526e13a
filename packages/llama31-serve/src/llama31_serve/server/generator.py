"""From a checked request to a running generation: place, prompt tokens, jobs, and, whatever happens, their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from llama31_serve.errors import FieldViolation
from llama31_serve.server.admission import Admission
from llama31_serve.server.caller import CALLER
from llama31_serve.server.engine import Sampling
from llama31_serve.server.engine_thread import EngineThread
from llama31_serve.server.generation import Generation
from llama31_serve.server.generation_request import ConversationInput, GenerationRequest, Limits
from llama31_serve.server.job import Inbox, Job, TextStream
from llama31_serve.server.lifecycle import Lifecycle
from llama31_serve.server.observer import Observer, RequestRecord
from llama31_serve.server.open_requests import OpenRequest, OpenRequests
from llama31_serve.server.refusal import Refusal, invalid, unknown_adapter
from llama31_serve.server.text import TextWorker
from llama31_tokenizer.stop_strings import StopStringMatcher

logger = logging.getLogger(__name__)
SEED_MODULUS = 2**64


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What was worked out of a request before it waited for its turn."""

    prompt_ids: Sequence[int]
    max_tokens: int
    mask: object | None


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
        observer: Observer,
    ) -> None:
        self.limits = limits
        self.text = text
        self._lifecycle = lifecycle
        self._admission = admission
        self._requests = requests
        self._engine = engine
        self._observer = observer

    @asynccontextmanager
    async def open(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """A generation whose jobs are in the engine. Leaving the block takes them out, if they have not ended.

        Raises:
            Refusal: not serving, no such adapter, id in use, full, prompt too long or not allowed, ended while waiting.
        """
        record = RequestRecord(request.request_id, CALLER.get(), request.n)
        self._observer.received(record)
        entry: OpenRequest | None = None
        try:
            self._lifecycle.require_serving()
            self._require_loaded(request.adapter)
            self._requests.require_free(request.request_id)
            with self._admission.reserve(request.n, record.caller.tenant) as place:
                entry = self._requests.add(request.request_id, place)
                async with self._running(request, entry, record) as generation:
                    yield generation
                record.code = grpc.StatusCode.CANCELLED if generation.unfinished else grpc.StatusCode.OK
        except Refusal as refusal:
            record.code = refusal.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            record.code = grpc.StatusCode.INTERNAL
            raise
        finally:
            if entry is not None and entry.generation is not None:
                entry.generation.describe(record)
            self._observer.ended(record)

    def abort(self, request_id: str) -> bool:
        """End an open request with what it has so far; False if there is none of this id."""
        entry = self._requests.get(request_id)
        if entry is None:
            return False
        if entry.generation is None:
            entry.fail(Refusal(grpc.StatusCode.ABORTED, "the request was aborted before it had begun"))
        else:
            self._end(entry.generation)
        return True

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self._engine.adapters

    def _require_loaded(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self.adapters:
            raise unknown_adapter(adapter, self.adapters)

    @asynccontextmanager
    async def _running(
        self, request: GenerationRequest, entry: OpenRequest, record: RequestRecord
    ) -> AsyncIterator[Generation]:
        timer: asyncio.TimerHandle | None = None
        try:
            prepared = await self._prepare(request, record)
            await entry.place.start()
            entry.generation = generation = self._generation(request, entry, prepared)
            try:
                for job in generation.jobs:
                    self._engine.submit(job)
                if request.deadline_s is not None:
                    timer = asyncio.get_running_loop().call_later(request.deadline_s, self._time_out, generation)
                yield generation
            finally:
                if timer is not None:
                    timer.cancel()
                for index in generation.unfinished:
                    self._engine.abort(generation.jobs[index].engine_id)
        finally:
            finished = entry.generation is not None and not entry.generation.unfinished
            self._requests.remove(entry, finished=finished)

    def _time_out(self, generation: Generation) -> None:
        generation.timed_out = True
        self._end(generation)

    def _end(self, generation: Generation) -> None:
        for index in generation.unfinished:
            self._engine.abort(generation.jobs[index].engine_id, tell=True)

    async def _prepare(self, request: GenerationRequest, record: RequestRecord) -> _Prepared:
        prompt_ids = await self.text.encode(request.prompt)
        kept = self._truncated(request, prompt_ids)
        record.prompt_tokens, record.dropped_prompt_tokens = len(kept), len(prompt_ids) - len(kept)
        if len(kept) < len(prompt_ids):
            logger.info(
                "request %s: kept the last %d of %d prompt tokens", request.request_id, len(kept), len(prompt_ids)
            )
        max_tokens = self._max_tokens(request, len(kept))
        record.clamped = request.max_tokens is not None and max_tokens < request.max_tokens
        mask = None if request.grammar is None else await self.text.compile_grammar(request.grammar)
        return _Prepared(kept, max_tokens, mask)

    def _truncated(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> Sequence[int]:
        limits = [len(prompt_ids)]
        if request.truncate_prompt_to is not None:
            limits.append(request.truncate_prompt_to)
        if self.limits.truncate_prompts:
            limits.append(self.limits.max_seq_len - 1)
            limits += [] if self.limits.max_prompt_tokens is None else [self.limits.max_prompt_tokens]
        return prompt_ids[len(prompt_ids) - min(limits) :]

    def _max_tokens(self, request: GenerationRequest, num_prompt_tokens: int) -> int:
        limit, most = self.limits.max_seq_len, self.limits.max_prompt_tokens
        if most is not None and num_prompt_tokens > most:
            raise invalid([FieldViolation("input", f"has {num_prompt_tokens} tokens, at most {most}; shorten it")])
        room = limit - num_prompt_tokens
        if room < 1:
            problem = (
                f"has {num_prompt_tokens} tokens, the context holds {limit} with at least one to generate; shorten it"
            )
            raise invalid([FieldViolation("input", problem)])
        room = room if self.limits.max_new_tokens is None else min(room, self.limits.max_new_tokens)
        if request.max_tokens is None:
            return min(self.limits.default_max_tokens, room)
        if request.max_tokens <= room or request.clamp_max_tokens:
            return min(request.max_tokens, room)
        problem = (
            f"is {request.max_tokens}, but after a prompt of {num_prompt_tokens} tokens the context of {limit} "
            f"has room for {room}; lower it or leave it unset"
        )
        if room == self.limits.max_new_tokens:
            problem = f"is {request.max_tokens}, this server makes at most {room} tokens; lower it or leave it unset"
        raise invalid([FieldViolation("max_tokens", problem)])

    def _stop_token_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        """A conversation also ends at the tokenizer's end-of-turn tokens, of which the model's config may not know."""
        if isinstance(request.prompt, ConversationInput) and not request.ignore_eos:
            return (*request.stop_token_ids, *self.text.model.tokenizer.stop_ids)
        return request.stop_token_ids

    def _generation(self, request: GenerationRequest, entry: OpenRequest, prepared: _Prepared) -> Generation:
        inbox = Inbox(self._observer.tokens)
        jobs = [self._job(request, index, prepared, inbox) for index in range(request.n)]
        return Generation(request.request_id, prepared.prompt_ids, jobs, inbox, entry.arrived_s)

    def _job(self, request: GenerationRequest, index: int, prepared: _Prepared, inbox: Inbox) -> Job:
        sampling = Sampling(
            max_tokens=prepared.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=None if request.seed is None else (request.seed + index) % SEED_MODULUS,
            stop_token_ids=self._stop_token_ids(request),
            ignore_eos=request.ignore_eos,
            min_tokens=min(request.min_tokens, prepared.max_tokens),
            min_p=request.min_p,
            typical_p=request.typical_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
            mask=prepared.mask,
            priority=request.priority,
            adapter=request.adapter,
            use_prefix_cache=request.use_prefix_cache,
        )
        decoder = self.text.model.stream_decoder(not request.include_special_tokens)
        matcher = StopStringMatcher(request.stop_strings, include_stop_string=request.include_stop_string)
        name = f"{request.request_id}#{index}"
        return Job(name, prepared.prompt_ids, sampling, TextStream(index, decoder, matcher), inbox)
