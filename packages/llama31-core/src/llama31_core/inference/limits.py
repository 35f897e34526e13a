"""Whether a request can run at all: token ids and parameters in, a typed error out before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama31_core.config import ModelConfig
from llama31_core.errors import RequestError
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask of an engine."""

    config: ModelConfig
    options: EngineOptions
    max_seq_len: int
    num_blocks: int
    block_size: int

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[list[int], int]:
        """The prompt and how many tokens to generate at most.

        Raises:
            RequestError: the prompt is empty, has ids outside the vocabulary, or the request does not fit.
        """
        if any(isinstance(token, bool) or not isinstance(token, (int, np.integer)) for token in prompt_ids):
            raise RequestError("the prompt holds something that is no integer; give token ids")
        prompt = [int(token) for token in prompt_ids]
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        self._check_ids(prompt, params)
        max_tokens = self._check_length(len(prompt), params)
        self._check_width(len(prompt), max_tokens, params)
        return prompt, max_tokens

    def _check_ids(self, prompt: list[int], params: SamplingParams) -> None:
        size = self.config.vocab_size
        outside = next((token for token in prompt if not 0 <= token < size), None)
        if outside is not None:
            raise RequestError(f"prompt id {outside} is outside the vocabulary (0 to {size - 1})")
        for name, largest in params.named_ids().items():
            if largest >= size:
                raise RequestError(f"{name} has id {largest}, outside the vocabulary (0 to {size - 1})")

    def _check_length(self, num_prompt: int, params: SamplingParams) -> int:
        options = self.options
        if options.max_prompt_tokens is not None and num_prompt > options.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, allowed are {options.max_prompt_tokens}; "
                f"shorten it or raise max_prompt_tokens"
            )
        if options.max_output_tokens is not None and (params.max_tokens or 0) > options.max_output_tokens:
            raise RequestError(
                f"max_tokens is {params.max_tokens}, allowed are {options.max_output_tokens}; "
                f"lower it or raise max_output_tokens"
            )
        room = self.max_seq_len - num_prompt
        most = room if options.max_output_tokens is None else min(room, options.max_output_tokens)
        max_tokens = most if params.max_tokens is None else params.max_tokens
        if room < 1 or max_tokens > room:
            what, lower = f"a prompt of {num_prompt} tokens leaves no room in", ""
            if params.max_tokens is not None:
                what = f"a prompt of {num_prompt} tokens and max_tokens={params.max_tokens} exceed"
                lower = ", lower max_tokens"
            raise RequestError(
                f"{what} the {self.max_seq_len} tokens of a request; shorten the prompt{lower}{self._way_out()}"
            )
        return max_tokens

    def _way_out(self) -> str:
        """What makes longer requests possible: the option that is the limit, if it is one and not the model."""
        if self.max_seq_len == self.config.max_seq_len:
            return f", as the model's context is {self.max_seq_len}"
        if self.max_seq_len == self.num_blocks * self.block_size:
            return " or raise num_blocks"
        return " or raise max_seq_len"

    def _check_width(self, num_prompt: int, max_tokens: int, params: SamplingParams) -> None:
        """Branches that run at once must have their places; beams, which run together, their blocks too."""
        name, width = ("num_beams", params.num_beams) if params.num_beams > 1 else ("n", params.n)
        if width > self.options.max_batch_size:
            raise RequestError(
                f"{name} is {width}, a batch has {self.options.max_batch_size} places; lower it or raise max_batch_size"
            )
        if params.num_beams == 1:
            return
        shared = num_prompt // self.block_size
        own = -(-(num_prompt + max_tokens) // self.block_size) - shared
        if shared + width * own > self.num_blocks:
            raise RequestError(
                f"{width} beams of {num_prompt} + {max_tokens} tokens need {shared + width * own} blocks, the cache "
                f"has {self.num_blocks}; lower num_beams or max_tokens, or raise num_blocks"
            )
        num_kept = max(2, 1 + len(params.stop_token_ids) + len(self.config.eos_token_ids)) * width
        if num_kept > self.config.vocab_size:
            raise RequestError(
                f"{width} beams choose among {num_kept} candidates, the vocabulary has {self.config.vocab_size}; "
                f"lower num_beams"
            )
