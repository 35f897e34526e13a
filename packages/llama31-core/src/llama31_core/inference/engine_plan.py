"""What an engine of a model would be, from its configuration and the head of its checkpoint: sizes and number types,
and whether a request fits. No MindSpore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama31_core.checkpoint import open_weights
from llama31_core.checkpoint.quantized import check_stored
from llama31_core.config import ModelConfig
from llama31_core.device import device_target
from llama31_core.errors import ConfigError
from llama31_core.inference.cache_dtype import check_ascend, cpu_cache_dtype
from llama31_core.inference.cache_plan import CachePlan, available_memory_bytes, gib, plan_cache
from llama31_core.inference.limits import RequestLimits
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.native_support import what_is_missing
from llama31_core.precision import Precision

_FLOAT32 = Precision()


@dataclass(frozen=True)
class EnginePlan:
    """A model's configuration, the options, and the sizes and number types that follow."""

    config: ModelConfig
    options: EngineOptions
    cache: CachePlan
    precision: Precision = _FLOAT32

    @classmethod
    def make(cls, config: ModelConfig, options: EngineOptions, precision: Precision = _FLOAT32) -> EnginePlan:
        """Size the cache for the memory that is free; what an NPU has is not known here and not checked.

        Keys and values have the type that `precision` says, whatever the options do.

        Raises:
            ConfigError: see `plan_cache`.
        """
        free = None if device_target() == "Ascend" else available_memory_bytes()
        return cls(config, options, plan_cache(config, options, precision=precision, available_bytes=free), precision)

    @classmethod
    def for_weights(
        cls,
        config: ModelConfig,
        options: EngineOptions,
        weights: Path,
        asked: Precision | None = None,
        *,
        num_ranks: int = 1,
    ) -> EnginePlan:
        """The plan of a checkpoint, whose tensors are looked at and not read.

        Args:
            config: the architecture.
            options: the wanted sizes.
            weights: model directory or weight file.
            asked: number types on Ascend, of a run file for instance; bfloat16 if None.
            num_ranks: over which the model is split.

        Raises:
            ConfigError: see `plan_cache`; a type of the cache that what computes here does not have.
            CheckpointError: the weights are missing, damaged or of another shape.
        """
        with open_weights(weights) as opened:
            check_stored(opened, config)
            stored = {opened.dtype(name) for name in opened.names() if "norm" not in name}
        if device_target() == "Ascend":
            precision = asked or Precision.on("Ascend")
            check_ascend(options.kv_cache_dtype, precision)
            return cls.make(config, options, precision)
        # As the runner has it: the native kernels take bfloat16 weights as they are, the portable ones know float32.
        keeps = stored == {"bfloat16"} and options.max_loras == 0 and what_is_missing() is None
        cache = cpu_cache_dtype(
            options.kv_cache_dtype,
            has_small_weights=keeps or config.quantization is not None,
            why_portable=_why_portable(options, num_ranks),
        )
        return cls.make(config, options, Precision("bfloat16" if keeps else "float32", "float32", cache))

    def check_request(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what the engine would refuse.

        Raises:
            RequestError: the request can never run.
        """
        cache = self.cache
        limits = RequestLimits(self.config, self.options, cache.max_seq_len, cache.num_blocks, cache.block_size)
        limits.check(prompt_ids, params)

    def for_draft(self, model_dir: Path) -> EnginePlan:
        """The plan of a draft model beside this one: a block for each of its blocks.

        Raises:
            ConfigError: another vocabulary, a shorter context, no tokens to guess, or memory does not suffice for both.
            CheckpointError: no weights.
        """
        config = ModelConfig.from_pretrained(model_dir)
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
        options = replace(
            self.options,
            num_blocks=self.cache.num_blocks,
            cache_memory_bytes=None,
            max_seq_len=self.cache.max_seq_len,
            max_loras=0,
        )
        plan = EnginePlan.for_weights(config, options, model_dir, self.precision)
        both, free = self.cache.total_bytes + plan.cache.total_bytes, available_memory_bytes()
        if device_target() != "Ascend" and free is not None and both > free:
            raise ConfigError(
                f"model and draft model need {gib(both)} with their caches, but {gib(free)} are free; "
                "lower num_blocks or cache_memory_bytes, or leave out the draft model"
            )
        return plan


def _why_portable(options: EngineOptions, num_ranks: int) -> str | None:
    """Why the portable kernels compute on a CPU, in one sentence; None if the native ones do."""
    if options.max_loras:
        return "adapters run on these alone; leave out max_loras for a bfloat16 cache"
    return "several ranks run on these alone" if num_ranks > 1 else what_is_missing()
