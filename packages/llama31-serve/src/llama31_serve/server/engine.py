"""What the server needs of an engine and of a tokenizer. Tests put fakes here, core_engine.py llama31_core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

GrammarKind = Literal["json_schema", "regex", "lark", "choice"]
EngineFinish = Literal["stop", "length", "abort"]
# "error" is a request that failed on its own; StepOutput.error says why.
StepFinish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion has to obey; `source` is the schema, pattern or grammar, or the choices."""

    kind: GrammarKind
    source: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is computed, sampled and stopped; the engine knows nothing of text.

    `mask` is what the engine's own compile_grammar made.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    mask: object | None = None
    priority: int = 0
    adapter: str | None = None
    use_prefix_cache: bool = True


class TokenLogprobs(Protocol):
    """Natural log-probabilities of one token, and of the likeliest ones in its place."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


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
    @property
    def logprobs(self) -> Sequence[TokenLogprobs] | None: ...
    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs | None] | None: ...


class RequestRejectedError(Exception):
    """The engine refuses a request; the message is for the caller who made it."""


class UnknownAdapterError(RequestRejectedError):
    """No adapter of this name is loaded."""


class AdapterError(Exception):
    """An adapter cannot be loaded or unloaded; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that requests can ask for."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds now, and counters since it was made (see llama31_core's EngineStats)."""

    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_host_blocks: int = 0
    num_free_host_blocks: int = 0
    num_preemptions: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    num_prefill_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_failed_requests: int = 0
    num_failed_passes_in_a_row: int = 0


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

    def close(self) -> None:
        """Give back what the engine holds; nothing is called after it."""

    def has_unfinished(self) -> bool: ...
    def gathering_s(self) -> float:
        """How long `step` would have nothing to do, because new requests wait for others."""

    def stats(self) -> EngineStats: ...
    def compile_grammar(self, grammar: Grammar, tokenizer: Tokenizer) -> object:
        """The mask of a grammar, for `Sampling.mask`; called from any thread. Raises RequestRejectedError."""

    def adapters(self) -> Sequence[Adapter]: ...
    def load_adapter(self, name: str, directory: Path) -> Adapter:
        """Raises AdapterError if it cannot be had."""

    def unload_adapter(self, name: str) -> None:
        """Raises UnknownAdapterError, or AdapterError while requests use it."""


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
    @property
    def special_tokens(self) -> Mapping[str, int]: ...
    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        allowed_special: AbstractSet[str] | Literal["all"] = frozenset(),
    ) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...
    def decode_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> bytes: ...


class StreamDecoder(Protocol):
    """Turns ids into text piece by piece, never half a character."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...
