"""What the server needs of an engine and of a tokenizer. Tests put fakes here, core_engine.py llama31_core."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, Protocol

EngineFinish = Literal["stop", "length", "abort"]
# "error" is a request that failed on its own; StepOutput.error says why.
StepFinish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is sampled and stopped; the engine knows nothing of text."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class StepOutput(Protocol):
    """What one engine step made for one request."""

    @property
    def request_id(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> StepFinish | None: ...
    @property
    def error(self) -> str | None: ...


class RequestRejectedError(Exception):
    """The engine refuses a request; the message is for the caller who made it."""


class Engine(Protocol):
    """Continuous batching, driven by one thread. A stop token ends a request and is not part of its tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    def warm_up(self) -> None: ...
    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a request. Raises RequestRejectedError if it can never run."""

    def step(self) -> Sequence[StepOutput]: ...
    def abort(self, request_id: str) -> bool:
        """Forget a request and free its memory now; False if it is not known."""

    def has_unfinished(self) -> bool: ...


class Tokenizer(Protocol):
    """llama31_tokenizer.Tokenizer, as far as the server uses it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def sha256(self) -> str: ...
    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        allowed_special: AbstractSet[str] | Literal["all"] = frozenset(),
    ) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


class StreamDecoder(Protocol):
    """Turns ids into text piece by piece, never half a character."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...
