"""What an engine of a model would be, from its configuration alone: sizes, and whether a request fits. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.cache_plan import CachePlan, available_memory_bytes, plan_cache
from llama31_core.inference.limits import RequestLimits
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.sampling_params import SamplingParams


@dataclass(frozen=True)
class EnginePlan:
    """A model's configuration, the options, and the sizes that follow."""

    config: ModelConfig
    options: EngineOptions
    cache: CachePlan

    @classmethod
    def make(cls, config: ModelConfig, options: EngineOptions) -> EnginePlan:
        """Size the cache for the memory that is free.

        Raises:
            ConfigError: see `plan_cache`.
        """
        return cls(config, options, plan_cache(config, options, available_bytes=available_memory_bytes()))

    def check_request(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what the engine would refuse.

        Raises:
            RequestError: the request can never run.
        """
        cache = self.cache
        limits = RequestLimits(self.config, self.options, cache.max_seq_len, cache.num_blocks, cache.block_size)
        limits.check(prompt_ids, params)

    def for_draft(self, config: ModelConfig) -> EnginePlan:
        """The plan of a draft model beside this one: a block for each of its blocks.

        Raises:
            ConfigError: another vocabulary, a shorter context, no tokens to guess, or memory does not suffice for both.
        """
        if config.vocab_size != self.config.vocab_size:
            raise ConfigError(
                f"the draft model's vocabulary has {config.vocab_size} tokens, the model's {self.config.vocab_size}; "
                f"take a draft model with the same tokenizer"
            )
        if config.max_seq_len < self.cache.max_seq_len:
            raise ConfigError(
                f"the draft model's context is {config.max_seq_len} tokens, requests may have "
                f"{self.cache.max_seq_len}; lower max_seq_len"
            )
        if self.options.num_speculative_tokens < 1:
            raise ConfigError("a draft model is given but num_speculative_tokens is 0; say how many tokens to guess")
        free = available_memory_bytes()
        options = replace(
            self.options,
            num_blocks=self.cache.num_blocks,
            cache_memory_bytes=None,
            max_seq_len=self.cache.max_seq_len,
            max_loras=0,
        )
        left = None if free is None else free - self.cache.total_bytes
        return EnginePlan(config, options, plan_cache(config, options, available_bytes=left))
