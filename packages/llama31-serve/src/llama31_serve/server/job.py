"""One completion on its way through the server, and the updates that come back for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama31_serve.server.engine import EngineFinish, Sampling, StreamDecoder
from llama31_serve.server.stop_strings import StopStringMatcher

FinishReason = Literal["stop_token", "stop_string", "length", "aborted"]
_REASONS: dict[EngineFinish, FinishReason] = {"stop": "stop_token", "length": "length", "abort": "aborted"}


@dataclass(frozen=True, slots=True)
class Finished:
    """How a completion ended."""

    reason: FinishReason
    completion_tokens: int
    stop_string: str = ""


@dataclass(slots=True)
class Update:
    """What happened to one completion since the update before. `failure` ends the whole request."""

    completion_index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None
    failure: Exception | None = None


class TextStream:
    """Tokens of one completion in, updates with text out. Used by the detokeniser thread alone."""

    def __init__(self, completion_index: int, decoder: StreamDecoder, matcher: StopStringMatcher) -> None:
        self._index = completion_index
        self._decoder = decoder
        self._matcher = matcher
        self._completion_tokens = 0
        self.ended = False

    def push(self, token_ids: Sequence[int], finish: EngineFinish | None) -> Update:
        """Text and tokens up to the first stop string, in whichever of `token_ids` it is complete."""
        update = Update(self._index)
        pieces: list[str] = []
        for token_id in token_ids:
            update.token_ids.append(token_id)
            pieces.append(self._matcher.push(self._decoder.push((token_id,))))
            if self._matcher.matched is not None:
                break
        self._completion_tokens += len(update.token_ids)
        if finish is not None and self._matcher.matched is None:
            pieces.append(self._matcher.push(self._decoder.flush()))
            if self._matcher.matched is None:
                pieces.append(self._matcher.flush())
        update.text = "".join(pieces)
        if self._matcher.matched is not None:
            update.finished = Finished("stop_string", self._completion_tokens, self._matcher.matched)
        elif finish is not None:
            update.finished = Finished(_REASONS[finish], self._completion_tokens)
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

    def __init__(self) -> None:
        self._waiting: dict[int, Update] = {}
        self._arrived = asyncio.Event()
        self.num_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    def put(self, update: Update, time_s: float) -> None:
        """Add an update that the engine made at `time_s` (time.monotonic)."""
        if update.token_ids:
            self.num_tokens += len(update.token_ids)
            self.first_token_s = time_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = time_s
        waiting = self._waiting.get(update.completion_index)
        if waiting is None:
            self._waiting[update.completion_index] = update
        else:
            waiting.text += update.text
            waiting.token_ids += update.token_ids
            waiting.finished = update.finished
            waiting.failure = update.failure
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
