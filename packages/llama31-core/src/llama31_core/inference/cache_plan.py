"""How large the cache is: a model's configuration and a budget in, numbers of blocks out, before weights are read.

Pure arithmetic but for `available_memory_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama31_core.checkpoint.quantized import packed_range_bytes, stored_bytes
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.options import EngineOptions
from llama31_core.lora.table import adapter_slots_bytes
from llama31_core.precision import Precision

DEFAULT_CACHE_BYTES = 1 << 30
_MAX_DEFAULT_CONTEXTS = 16
_FLOAT32 = Precision()
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CachePlan:
    """Sizes of a model and its cache.

    Attributes:
        block_size: tokens of a block.
        num_blocks: on the device.
        num_host_blocks: on the host.
        block_bytes: one block of all layers.
        weight_bytes: the parameters, with the slots of adapters.
        max_seq_len: tokens that a request may have.
    """

    block_size: int
    num_blocks: int
    num_host_blocks: int
    block_bytes: int
    weight_bytes: int
    max_seq_len: int

    @property
    def total_bytes(self) -> int:
        """Weights and both caches."""
        return self.weight_bytes + (self.num_blocks + self.num_host_blocks) * self.block_bytes


def plan_cache(
    config: ModelConfig,
    options: EngineOptions,
    *,
    precision: Precision = _FLOAT32,
    available_bytes: int | None = None,
) -> CachePlan:
    """Size the cache.

    Args:
        config: the model.
        options: the wanted sizes.
        precision: number types of weights, products and cache.
        available_bytes: memory that weights and caches must fit into; None does not check it.

    Raises:
        ConfigError: a cache too small for `max_seq_len` or for one block, or more than there is memory for; adapters
            beside quantised weights.
    """
    if config.quantization is not None and options.max_loras:
        raise ConfigError(f"max_loras is {options.max_loras}, allowed with a quantised model is 0")
    block_bytes = block_size_bytes(config, options.block_size, precision.cache_bytes)
    num_blocks = options.num_blocks
    if num_blocks is None:
        budget = options.cache_memory_bytes or DEFAULT_CACHE_BYTES
        num_blocks = budget // block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"cache_memory_bytes is {budget:,}, one block of {options.block_size} tokens takes {block_bytes:,}; "
                f"raise cache_memory_bytes or lower block_size"
            )
        if options.cache_memory_bytes is None:
            contexts = _MAX_DEFAULT_CONTEXTS * -(-config.max_seq_len // options.block_size)
            num_blocks = min(num_blocks, contexts)
    plan = CachePlan(
        options.block_size,
        num_blocks,
        options.num_host_blocks,
        block_bytes,
        _weight_bytes(config, precision)
        + adapter_slots_bytes(config, options.max_loras, options.max_lora_rank, precision.param_bytes),
        largest_request(config, options.max_seq_len, num_blocks, options.block_size, block_bytes),
    )
    if available_bytes is not None and plan.total_bytes > available_bytes:
        raise ConfigError(
            f"the model needs {gib(plan.total_bytes)}: {gib(plan.weight_bytes)} of weights in "
            f"{_weights_are(config, precision)}, "
            f"{gib(num_blocks * block_bytes)} of {precision.cache_dtype} cache (num_blocks={num_blocks}) and "
            f"{gib(plan.num_host_blocks * block_bytes)} of host cache (num_host_blocks={plan.num_host_blocks}), but "
            f"{gib(available_bytes)} are free; lower cache_memory_bytes, num_blocks or num_host_blocks, take a "
            f"smaller model or a machine with more memory"
        )
    return plan


def _weight_bytes(config: ModelConfig, precision: Precision) -> int:
    if config.quantization is None:
        return config.num_parameters * precision.param_bytes
    return stored_bytes(config) + (packed_range_bytes(config) if precision.compute == "float32" else 0)


def _weights_are(config: ModelConfig, precision: Precision) -> str:
    return precision.param if config.quantization is None else f"{config.quantization.bits} bits"


def largest_request(
    config: ModelConfig, max_seq_len: int | None, num_blocks: int, block_size: int, block_bytes: int | None = None
) -> int:
    """Tokens that one request may have: `max_seq_len` if that fits, else the most that context and cache hold.

    Raises:
        ConfigError: `max_seq_len` is more than that.
    """
    in_cache = num_blocks * block_size
    limit = min(config.max_seq_len, in_cache)
    if max_seq_len is None or max_seq_len <= limit:
        return max_seq_len or limit
    if max_seq_len > config.max_seq_len:
        advice = "lower max_seq_len"
    else:
        needed = -(-max_seq_len // block_size)
        size = "" if block_bytes is None else f" or cache_memory_bytes to {needed * block_bytes:,}"
        advice = f"raise num_blocks to {needed}{size}, or lower max_seq_len"
    raise ConfigError(
        f"max_seq_len is {max_seq_len}, allowed is 1 to {limit} "
        f"(context {config.max_seq_len}, cache {in_cache} tokens); {advice}"
    )


def block_size_bytes(config: ModelConfig, block_size: int, bytes_per_number: int = 4) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in every layer."""
    return 2 * bytes_per_number * config.n_layers * config.n_kv_heads * config.head_dim * block_size


def available_memory_bytes() -> int | None:
    """Host memory that is free for this process: the machine's and, in a container, what its limit leaves; None if the
    system does not say."""
    free = []
    try:
        fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free += [int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:"]
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


def gib(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / (1 << 30):.2f} GiB"
