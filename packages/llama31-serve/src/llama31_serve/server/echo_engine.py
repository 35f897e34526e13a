"""EchoEngine: an engine that repeats its prompt, so that every answer can be worked out by hand.

The server's tests and benchmark run on it, and so can the tests of a client: no model, no MindSpore.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama31_serve.server.engine import (
    Adapter,
    AdapterError,
    EngineStats,
    Grammar,
    RequestRejectedError,
    Sampling,
    StepFinish,
    Tokenizer,
    UnknownAdapterError,
)


@dataclass(frozen=True, slots=True)
class EchoLogprobs:
    """See TokenLogprobs. An echo is certain of the token; the ids after it get -1, -2, …"""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, token_id: int, count: int, vocab_size: int) -> EchoLogprobs:
        """The report on a token with `count` alternatives."""
        return cls(token_id, 0.0, [((token_id + i) % vocab_size, -float(i)) for i in range(count)])


@dataclass(frozen=True, slots=True)
class EchoOutput:
    """See StepOutput."""

    request_id: str
    token_ids: list[int]
    finish_reason: StepFinish | None
    error: str | None = None
    logprobs: list[EchoLogprobs] | None = None
    prompt_logprobs: list[EchoLogprobs | None] | None = None


@dataclass(slots=True)
class _Request:
    prompt_ids: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    num_made: int = 0


class EchoEngine:
    """Token i of a completion is token i of the prompt, over and over.

    Args:
        vocab_size: ids are below it.
        max_seq_len: most tokens of prompt and completion together.
        eos_token_ids: end a completion, unless ignore_eos.
        step_s: how long a step takes.
    """

    BLOCK_SIZE = 16
    NUM_BLOCKS = 1 << 20

    def __init__(
        self, *, vocab_size: int, max_seq_len: int = 4096, eos_token_ids: tuple[int, ...] = (), step_s: float = 0.0
    ) -> None:
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.eos_token_ids = eos_token_ids
        self.step_s = step_s
        self.num_steps = 0
        self.num_aborted = 0
        self._requests: dict[str, _Request] = {}
        self._adapters: dict[str, Adapter] = {}

    @property
    def num_requests(self) -> int:
        """Requests that hold blocks."""
        return len(self._requests)

    @property
    def num_used_blocks(self) -> int:
        """Cache blocks that the requests hold."""
        sizes = [len(request.prompt_ids) + request.num_made for request in tuple(self._requests.values())]
        return sum(-(-size // self.BLOCK_SIZE) for size in sizes)

    def warm_up(self) -> None:
        """Nothing to do."""

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """See Engine.add."""
        if sampling.adapter is not None and sampling.adapter not in self._adapters:
            raise UnknownAdapterError(f"no adapter {sampling.adapter!r} is loaded")
        if request_id in self._requests:
            raise RequestRejectedError(f"request id {request_id!r} is in use")
        if len(prompt_ids) + sampling.max_tokens > self.max_seq_len:
            raise RequestRejectedError(f"prompt and max_tokens exceed {self.max_seq_len} tokens")
        stop_ids = frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else self.eos_token_ids)
        self._requests[request_id] = _Request(list(prompt_ids), sampling, stop_ids)

    def step(self) -> list[EchoOutput]:
        """One token for every request."""
        self.num_steps += 1
        if self.step_s:
            time.sleep(self.step_s)
        outputs = [self._next(request_id, request) for request_id, request in self._requests.items()]
        for output in outputs:
            if output.finish_reason is not None:
                del self._requests[output.request_id]
        return outputs

    def abort(self, request_id: str) -> bool:
        """See Engine.abort."""
        known = self._requests.pop(request_id, None) is not None
        self.num_aborted += known
        return known

    def close(self) -> None:
        """Nothing to do."""

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def gathering_s(self) -> float:
        """See Engine."""
        return 0.0

    def stats(self) -> EngineStats:
        """See Engine."""
        used = self.num_used_blocks
        return EngineStats(
            num_running=self.num_requests, num_blocks=self.NUM_BLOCKS, num_free_blocks=self.NUM_BLOCKS - used
        )

    def compile_grammar(self, grammar: Grammar, tokenizer: Tokenizer) -> object:
        """See Engine. An echo obeys nobody."""
        raise RequestRejectedError(f"this engine has no structured output; leave {grammar.kind} out")

    def adapters(self) -> Sequence[Adapter]:
        """See Engine."""
        return list(self._adapters.values())

    def load_adapter(self, name: str, directory: Path) -> Adapter:
        """See Engine. Anything that is a directory will do."""
        if name in self._adapters or not directory.is_dir():
            raise AdapterError(f"{name!r} is loaded, or {directory} is no directory")
        self._adapters[name] = Adapter(name, str(directory))
        return self._adapters[name]

    def unload_adapter(self, name: str) -> None:
        """See Engine."""
        if name not in self._adapters:
            raise UnknownAdapterError(f"no adapter {name!r} is loaded")
        if any(request.sampling.adapter == name for request in self._requests.values()):
            raise AdapterError(f"adapter {name!r} is in use; unload it when its requests have ended")
        del self._adapters[name]

    def _next(self, request_id: str, request: _Request) -> EchoOutput:
        token_id = request.prompt_ids[request.num_made % len(request.prompt_ids)]
        if token_id in request.stop_ids:
            return EchoOutput(request_id, [], "stop")
        request.num_made += 1
        finish: StepFinish | None = "length" if request.num_made >= request.sampling.max_tokens else None
        logprobs, prompt_logprobs = self._reports(request, token_id)
        return EchoOutput(request_id, [token_id], finish, None, logprobs, prompt_logprobs)

    def _reports(
        self, request: _Request, token_id: int
    ) -> tuple[list[EchoLogprobs] | None, list[EchoLogprobs | None] | None]:
        """Log-probabilities of the token, and with the first one those of the prompt, if they were asked for."""
        count, prompt_count = request.sampling.logprobs, request.sampling.prompt_logprobs
        logprobs = None if count is None else [EchoLogprobs.of(token_id, count, self.vocab_size)]
        if prompt_count is None or request.num_made > 1:
            return logprobs, None
        later = [EchoLogprobs.of(token, prompt_count, self.vocab_size) for token in request.prompt_ids[1:]]
        return logprobs, [None, *later]
