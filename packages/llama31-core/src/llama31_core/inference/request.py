"""The state of one request while the engine works on it, and what the engine reports of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from llama31_core.inference.block_manager import hash_block
from llama31_core.inference.sampling import Sampler, TokenLogprobs
from llama31_core.inference.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Completion:
    """The tokens generated for one prompt (without the one that stopped it) and why they ended.

    `logprobs` has an entry for every token if the request asked for them.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class StepOutput:
    """What one step of the engine added to one request; `finish_reason` is None while it goes on."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it.

    `num_cached` counts the tokens whose keys and values are in the blocks of `block_table`; `block_hashes` are those of
    its full blocks, as far as they have been worked out.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    sampler: Sampler
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end` of prompt and completion."""
        split = len(self.prompt_ids)
        return self.prompt_ids[start:end] + self.output_ids[max(start - split, 0) : max(end - split, 0)]

    def uncached_ids(self, limit: int) -> list[int]:
        """The next tokens to compute, at most `limit`; after a preemption they reach into the completion."""
        return self.token_ids(self.num_cached, min(self.num_tokens, self.num_cached + limit))

    def hash_blocks(self, num_tokens: int, block_size: int) -> list[bytes]:
        """The hashes of the blocks that the first `num_tokens` tokens fill."""
        for index in range(len(self.block_hashes), num_tokens // block_size):
            parent = self.block_hashes[-1] if self.block_hashes else None
            tokens = self.token_ids(index * block_size, (index + 1) * block_size)
            self.block_hashes.append(hash_block(parent, tokens))
        return self.block_hashes[: num_tokens // block_size]

    def draw(self, logits_V: npt.NDArray[np.float32]) -> int:
        """The next token; nothing but the generator's state changes."""
        return self.sampler.draw(logits_V, self.prompt_ids, self.output_ids)

    def accept(self, token: int, logits_V: npt.NDArray[np.float32]) -> StepOutput:
        """Append a drawn token, or end the request."""
        if token in self.stop_ids:
            return StepOutput(self.request_id, [], "stop")
        self.output_ids.append(token)
        reason: FinishReason | None = "length" if len(self.output_ids) >= self.max_tokens else None
        logprobs = self.sampler.logprobs(logits_V, token)
        if logprobs is None:
            return StepOutput(self.request_id, [token], reason)
        self.output_logprobs.append(logprobs)
        return StepOutput(self.request_id, [token], reason, [logprobs])
