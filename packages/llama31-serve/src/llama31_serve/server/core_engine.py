"""llama31_core's engine in the shape the server knows: with model_files.py, all that imports llama31_core."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

from llama31_core import Engine, ModelConfig, SamplingParams
from llama31_core.device import ASCEND
from llama31_core.errors import ConfigError, Llama31Error, RequestError
from llama31_core.inference.cache_plan import available_memory_bytes
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.logits_mask import LogitsMaskFactory
from llama31_core.inference.options import EngineOptions as CoreOptions
from llama31_core.inference.structured import GrammarCompiler
from llama31_serve.server.engine import (
    Adapter,
    AdapterError,
    EngineStats,
    Grammar,
    RequestRejectedError,
    Sampling,
    StepOutput,
    Tokenizer,
    UnknownAdapterError,
)
from llama31_serve.server.options import EngineOptions
from llama31_serve.server.settings import Settings

GIB = 1 << 30

# Sampling's fields that are SamplingParams' under the same name.
_SHARED = {field.name for field in fields(Sampling)} & {field.name for field in fields(SamplingParams)}


class CoreEngine:
    """A llama31_core.Engine behind the server's Engine protocol."""

    def __init__(self, engine: Engine, close: Callable[[], None] = lambda: None) -> None:
        """`close` ends what the engine computes with."""
        self._engine = engine
        self.close = close
        self.vocab_size = engine.config.vocab_size
        self.max_seq_len = engine.max_seq_len
        self.eos_token_ids = engine.config.eos_token_ids
        self.warm_up = engine.warm_up
        self.abort = engine.abort
        self.has_unfinished = engine.has_unfinished
        self.gathering_s = engine.gathering_s
        self._num_blocks = engine.num_free_blocks
        self._grammars: GrammarCompiler | None = None
        self._grammars_lock = threading.Lock()
        self._num_host_blocks = engine.stats().num_free_host_blocks

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """See Engine.add."""
        adapter = sampling.adapter
        if adapter is not None and all(loaded.name != adapter for loaded in self._engine.adapters):
            raise UnknownAdapterError(f"no adapter {adapter!r} is loaded")
        try:
            params = SamplingParams(
                **{name: getattr(sampling, name) for name in _SHARED},
                logits_mask=cast("LogitsMaskFactory | None", sampling.mask),
            )
            self._engine.add(request_id, prompt_ids, params, priority=sampling.priority, adapter=adapter)
        except RequestError as error:
            raise RequestRejectedError(str(error)) from error

    def step(self) -> Sequence[StepOutput]:
        """See Engine.step."""
        return self._engine.step()

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        stats = self._engine.stats()
        shared = {field.name: getattr(stats, field.name) for field in fields(stats)}
        return EngineStats(num_blocks=self._num_blocks, num_host_blocks=self._num_host_blocks, **shared)

    def compile_grammar(self, grammar: Grammar, tokenizer: Tokenizer) -> object:
        """See Engine.compile_grammar."""
        try:
            with self._grammars_lock:
                if self._grammars is None:
                    self._grammars = self._grammar_compiler(tokenizer)
            return getattr(self._grammars, grammar.kind)(grammar.source)
        except (RequestError, ConfigError) as error:
            raise RequestRejectedError(str(error)) from error

    def _grammar_compiler(self, tokenizer: Tokenizer) -> GrammarCompiler:
        """Takes a while, once. A token that is no text, or that the vocabulary does not have, stands for nothing."""
        special = set(tokenizer.special_tokens.values())
        texts = [
            b"" if token_id in special or token_id >= tokenizer.vocab_size else tokenizer.decode_bytes([token_id])
            for token_id in range(self.vocab_size)
        ]
        return GrammarCompiler(texts, self.eos_token_ids or tokenizer.stop_ids, sorted(special))

    def adapters(self) -> Sequence[Adapter]:
        """See Engine.adapters."""
        return [Adapter(loaded.name, str(loaded.source)) for loaded in self._engine.adapters]

    def load_adapter(self, name: str, directory: Path) -> Adapter:
        """See Engine.load_adapter."""
        try:
            loaded = self._engine.load_adapter(name, directory)
        except Llama31Error as error:
            raise AdapterError(str(error)) from error
        return Adapter(loaded.name, str(loaded.source))

    def unload_adapter(self, name: str) -> None:
        """See Engine.unload_adapter."""
        if all(loaded.name != name for loaded in self._engine.adapters):
            raise UnknownAdapterError(f"no adapter {name!r} is loaded")
        try:
            self._engine.unload_adapter(name)
        except Llama31Error as error:
            raise AdapterError(str(error)) from error


def fit_caches(model_dir: Path, weights: Path, settings: Settings) -> tuple[EngineOptions, list[str]]:
    """The engine's options with blocks for the host's cache; on a CPU both caches lie in the memory that there is.

    A device's own memory is what an operator knows best. On a CPU, a size meant for a device would take the machine's
    last byte, so the cache is no larger than a full batch could use, and than a quarter of what the weights leave free.

    Raises:
        Llama31Error: no model there, or weights that memory does not hold.
    """
    options = settings.engine
    notes: list[str] = []
    asked = options.cache_memory_bytes
    if asked is None and not settings.host_cache_bytes:
        return options, notes
    least = replace(options, num_blocks=1, cache_memory_bytes=None, max_seq_len=None)
    plan = plan_engine(model_dir, weights, least, settings.tensor_parallel)
    config, block_bytes = plan.config, plan.cache.block_bytes
    if asked is not None and not ASCEND.exists():
        batch, longest = options.max_batch_size or CoreOptions.max_batch_size, options.max_seq_len or config.max_seq_len
        useful = batch * -(-longest // (options.block_size or CoreOptions.block_size)) * block_bytes
        free = available_memory_bytes()
        spare = asked if free is None else (free - plan.cache.weight_bytes) // 4
        given = max(block_bytes, min(asked, useful, spare))
        if given < asked:
            options = replace(options, cache_memory_bytes=given)
            notes.append(f"npuMemSize {asked / GIB:g} GiB (on this CPU the cache has {given / GIB:.1f} GiB)")
    if settings.host_cache_bytes:
        blocks = settings.host_cache_bytes // block_bytes
        if not ASCEND.exists():
            blocks = min(blocks, (options.cache_memory_bytes or GIB) // block_bytes // 2)
        options = replace(options, num_host_blocks=blocks)
    return options, notes


def describe(model_dir: Path) -> tuple[str, str | None]:
    """What GET /info tells of device and numbers."""
    values = json.loads((model_dir / "config.json").read_text("utf-8"))
    dtype = values.get("torch_dtype") or values.get("dtype") or values.get("compute_dtype")
    return "npu" if ASCEND.exists() else "cpu", None if dtype is None else str(dtype)


def plan_engine(model_dir: Path, weights: Path, options: EngineOptions, num_ranks: int = 1) -> EnginePlan:
    """What `load_engine`, or so many ranks, would build; no weights are read yet.

    Raises llama31_core's errors for what cannot work.
    """
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    sizes = CoreOptions(**{name: value for name, value in chosen.items() if value is not None})
    return EnginePlan.for_weights(ModelConfig.from_pretrained(model_dir), sizes, weights, num_ranks=num_ranks)


def load_engine(plan: EnginePlan, weights: Path) -> CoreEngine:
    """The engine that a plan describes. Raises llama31_core's errors."""
    return CoreEngine(Engine.from_plan(plan, weights))
