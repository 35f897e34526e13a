"""One completion on its way through the server, and the updates that come back for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama31_serve.server.engine import EngineFinish, Sampling, StreamDecoder, TokenLogprobs
from llama31_tokenizer.stop_strings import StopStringMatcher

FinishReason = Literal["stop_token", "stop_string", "length", "aborted"]
_REASONS: dict[EngineFinish, FinishReason] = {"stop": "stop_token", "length": "length", "abort": "aborted"}


@dataclass(frozen=True, slots=True)
class Finished:
    """How a completion ended."""

    reason: FinishReason
    completion_tokens: int
    stop_string: str = ""


PromptLogprobs = Sequence[TokenLogprobs | None]


@dataclass(slots=True)
class Update:
    """What happened to one completion since the update before. `failure` ends the whole request.

    Attributes:
        token_ids: new tokens.
        pieces: the text that each of them released: whole characters, nothing that may begin a stop string.
        tail: text that the end released.
        logprobs: of each token, if they were asked for.
        prompt_logprobs: of each token of the prompt, once, if they were asked for.
    """

    completion_index: int
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    tail: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finished: Finished | None = None
    failure: Exception | None = None

    @property
    def text(self) -> str:
        """All new text."""
        return "".join(self.pieces) + self.tail


@dataclass(frozen=True, slots=True)
class StepText:
    """What a step made for one completion."""

    token_ids: Sequence[int] = ()
    finish: EngineFinish | None = None
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None


NOTHING = StepText()


class TextStream:
    """Tokens of one completion in, updates with text out. Used by the detokeniser thread alone."""

    def __init__(self, completion_index: int, decoder: StreamDecoder, matcher: StopStringMatcher) -> None:
        self._index = completion_index
        self._decoder = decoder
        self._matcher = matcher
        self._completion_tokens = 0
        self.ended = False

    def push(self, output: StepText) -> Update:
        """Text and tokens up to the first stop string, in whichever of the tokens it is complete."""
        update = Update(self._index, prompt_logprobs=output.prompt_logprobs)
        for token_id in output.token_ids:
            update.token_ids.append(token_id)
            update.pieces.append(self._matcher.push(self._decoder.push((token_id,))))
            if self._matcher.matched is not None:
                break
        if output.logprobs is not None:
            update.logprobs = list(output.logprobs[: len(update.token_ids)])
        self._completion_tokens += len(update.token_ids)
        if output.finish is not None and self._matcher.matched is None:
            update.tail = self._matcher.push(self._decoder.flush())
            if self._matcher.matched is None:
                update.tail += self._matcher.flush()
        if self._matcher.matched is not None:
            update.finished = Finished("stop_string", self._completion_tokens, self._matcher.matched)
        elif output.finish is not None:
            update.finished = Finished(_REASONS[output.finish], self._completion_tokens)
        self.ended = update.finished is not None
        return update

    def fail(self, error: Exception) -> Update:
        """The update that ends the request with an error."""
        self.ended = True
        return Update(self._index, failure=error)


class Inbox:
    """Updates of all completions of one request, waiting to be sent. Used on the event loop alone.

    Updates that the reader has not taken yet are merged, so a slow reader costs at most the tokens of its own request.
    """

    def __init__(self, on_tokens: Callable[[int, float | None], None] | None = None) -> None:
        """`on_tokens(count, gap_s)` hears of each step's tokens: how many, and how long after those before (None: the
        first of their completion)."""
        self._waiting: dict[int, Update] = {}
        self._arrived = asyncio.Event()
        self._on_tokens = on_tokens
        self._last_s: dict[int, float] = {}
        self.num_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    def put(self, update: Update, time_s: float) -> None:
        """Add an update that the engine made at `time_s` (time.monotonic)."""
        if update.token_ids:
            self.num_tokens += len(update.token_ids)
            self.first_token_s = time_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = time_s
            if self._on_tokens is not None:
                before_s = self._last_s.get(update.completion_index)
                self._last_s[update.completion_index] = time_s
                self._on_tokens(len(update.token_ids), None if before_s is None else time_s - before_s)
        waiting = self._waiting.get(update.completion_index)
        if waiting is None:
            self._waiting[update.completion_index] = update
        else:
            waiting.token_ids += update.token_ids
            waiting.pieces += update.pieces
            waiting.tail += update.tail
            waiting.logprobs += update.logprobs
            waiting.prompt_logprobs = waiting.prompt_logprobs or update.prompt_logprobs
            waiting.finished = waiting.finished or update.finished
            waiting.failure = waiting.failure or update.failure  # tokens may still come from an engine that is given up
        self._arrived.set()

    async def take(self) -> list[Update]:
        """Everything that has arrived; waits until there is something."""
        await self._arrived.wait()
        self._arrived.clear()
        updates = list(self._waiting.values())
        self._waiting.clear()
        return updates


@dataclass(slots=True, eq=False)
class Job:
    """One completion as the engine thread and the detokeniser see it."""

    engine_id: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    text: TextStream
    inbox: Inbox
    started_s: float | None = None
