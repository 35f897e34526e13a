"""EchoEngine: an engine that repeats its prompt, so that every answer can be worked out by hand.

The server's tests and benchmark run on it, and so can the tests of a client: no model, no MindSpore.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llama31_serve.server.engine import RequestRejectedError, Sampling, StepFinish


@dataclass(frozen=True, slots=True)
class EchoOutput:
    """See StepOutput."""

    request_id: str
    token_ids: list[int]
    finish_reason: StepFinish | None
    error: str | None = None


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

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def _next(self, request_id: str, request: _Request) -> EchoOutput:
        token_id = request.prompt_ids[request.num_made % len(request.prompt_ids)]
        if token_id in request.stop_ids:
            return EchoOutput(request_id, [], "stop")
        request.num_made += 1
        finish: StepFinish | None = "length" if request.num_made >= request.sampling.max_tokens else None
        return EchoOutput(request_id, [token_id], finish)
