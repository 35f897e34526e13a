"""What an engine is given to work with: sizes and limits, checked when they are put together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llama31_core.errors import ConfigError
from llama31_core.inference.cache_dtype import KvCacheDtype, check_name


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an engine. None is for what the cache or the model's context holds.

    Attributes:
        max_seq_len: tokens of prompt and completion of one request.
        max_prompt_tokens: tokens of a prompt.
        max_output_tokens: tokens of a completion.
        block_size: tokens that one block of the cache holds.
        num_blocks: blocks of the cache.
        cache_memory_bytes: size of the cache, instead of `num_blocks`; a gibibyte if neither is given.
        kv_cache_dtype: type of keys and values, "auto", "float32" or "bfloat16" (see `cpu_cache_dtype`).
        num_host_blocks: blocks of host memory for sequences that had to make room; 0 computes them again.
        max_batch_size: sequences that run at once; more wait.
        max_prefill_tokens: prompt tokens computed in one step: what a running sequence waits for at most.
        max_prefill_batch_size: prompts that a step computes tokens of.
        max_queue_delay_s: how long a new request may wait for others to be prefilled with.
        priority_step_s: a request of priority p is served as if it had come p times this much later.
        num_speculative_tokens: tokens guessed ahead of every decoding sequence; 0 for none.
        max_loras: adapters that can be loaded at once; 0 for none.
        max_lora_rank: the largest rank of one.

    Raises:
        ConfigError: a value outside its range, or two that say the same thing.
    """

    max_seq_len: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    cache_memory_bytes: int | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    num_host_blocks: int = 0
    max_batch_size: int = 16
    max_prefill_tokens: int = 512
    max_prefill_batch_size: int = 8
    max_queue_delay_s: float = 0.0
    priority_step_s: float = 10.0
    num_speculative_tokens: int = 0
    max_loras: int = 0
    max_lora_rank: int = 16

    def __post_init__(self) -> None:
        may_be_zero = ("num_host_blocks", "max_queue_delay_s", "priority_step_s", "num_speculative_tokens", "max_loras")
        for name in (field.name for field in fields(self) if field.name != "kv_cache_dtype"):
            value = getattr(self, name)
            least = 0 if name in may_be_zero else 1
            wanted = (int, float) if name.endswith("_s") else int
            if value is not None and (isinstance(value, bool) or not isinstance(value, wanted) or not value >= least):
                kind = "a number" if name.endswith("_s") else "an integer"
                raise ConfigError(f"{name} is {value!r}, allowed is {kind} >= {least}")
        check_name(self.kv_cache_dtype)
        if self.num_blocks is not None and self.cache_memory_bytes is not None:
            raise ConfigError("num_blocks and cache_memory_bytes both say how large the cache is; give one of them")
