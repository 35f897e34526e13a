"""One growing sequence of tokens of a request and where it is in the cache: the unit that the scheduler runs.

A request has one, or n, or as many as it has beams.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llama31_core.inference.block_manager import hash_block
from llama31_core.inference.request import FinishReason, PromptLogprobs, Request
from llama31_core.inference.sampling import Sampler, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """Prompt and what has been generated for it.

    Attributes:
        request: what it belongs to.
        index: its number among those of the request.
        sampler: draws its tokens.
        width: places it takes in a batch: those of all the branches that it will fork into.
        in_lockstep: beams run and are preempted together.
        block_table: device blocks; host_table: host blocks while it is swapped out.
        block_hashes: of its full blocks, as far as they have been worked out.
        num_cached: tokens whose keys and values are in its blocks.
        prompt_logprobs: of the prompt so far, if the request wants them.
        in_flight: a pass with its next tokens has begun and not ended: until then it keeps its blocks and waits.
        beam_scores: (V,) adjusted log-probabilities that a beam has computed and that wait for those of the others.
    """

    request: Request
    index: int
    sampler: Sampler
    width: int = 1
    in_lockstep: bool = False
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    host_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    in_flight: bool = False
    prompt_logprobs: PromptLogprobs = field(default_factory=list)
    beam_scores: npt.NDArray[np.float64] | None = None

    @property
    def urgency(self) -> tuple[tuple[float, int], int]:
        """Less is served earlier."""
        return self.request.urgency, self.index

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def num_uncached(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return self.num_tokens - self.num_cached

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of prompt tokens are still to be looked at."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.request.prompt_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end` of prompt and completion."""
        split = len(self.request.prompt_ids)
        return self.request.prompt_ids[start:end] + self.output_ids[max(start - split, 0) : max(end - split, 0)]

    @property
    def _root_hash(self) -> bytes | None:
        """What stands before the first block: other adapters make other keys and values of the same tokens."""
        return None if self.request.adapter is None else self.request.adapter.digest

    def hash_blocks(self, num_tokens: int, block_size: int) -> list[bytes]:
        """The hashes of the blocks that the first `num_tokens` tokens fill."""
        for index in range(len(self.block_hashes), num_tokens // block_size):
            parent = self.block_hashes[-1] if self.block_hashes else self._root_hash
            tokens = self.token_ids(index * block_size, (index + 1) * block_size)
            self.block_hashes.append(hash_block(parent, tokens))
        return self.block_hashes[: num_tokens // block_size]

    def draw(self, logits_V: npt.NDArray[np.float32]) -> int:
        """The next token."""
        return self.sampler.draw(logits_V, self.request.prompt_ids, self.output_ids)

    def accept(self, token: int, logits_V: npt.NDArray[np.float32]) -> FinishReason | None:
        """Append a drawn token, unless it ends the completion; gives the reason if that has ended."""
        if token in self.request.stop_ids:
            return "stop"
        self.output_ids.append(token)
        logprobs = self.sampler.logprobs(logits_V, token)
        if logprobs is not None:
            self.output_logprobs.append(logprobs)
        if self.sampler.accept(token):
            return "stop"
        return "length" if len(self.output_ids) >= self.request.max_tokens else None

    def note_prompt(self, start: int, logits_TV: npt.NDArray[np.float32]) -> None:
        """Report the prompt tokens that follow those at position `start` and after, given their logits."""
        prompt = self.request.prompt_ids
        if start == 0:
            self.prompt_logprobs = [None]
        for position, logits_V in enumerate(logits_TV[: len(prompt) - start - 1], start + 1):
            if position == len(self.prompt_logprobs):  # else it was reported before a preemption
                count = self.request.params.prompt_logprobs or 0
                self.prompt_logprobs.append(TokenLogprobs.of(logits_V, prompt[position], count))
