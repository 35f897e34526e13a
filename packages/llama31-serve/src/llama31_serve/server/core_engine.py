"""llama31_core's engine in the shape the server knows: the one module that imports llama31_core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

from llama31_core import Engine, ModelConfig, SamplingParams
from llama31_core.errors import Llama31Error, RequestError
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.logits_mask import LogitsMaskFactory
from llama31_core.inference.options import EngineOptions as CoreOptions
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

# Sampling's fields that are SamplingParams' under the same name.
_SHARED = {field.name for field in fields(Sampling)} & {field.name for field in fields(SamplingParams)}


class CoreEngine:
    """A llama31_core.Engine behind the server's Engine protocol."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.vocab_size = engine.config.vocab_size
        self.max_seq_len = engine.max_seq_len
        self.eos_token_ids = engine.config.eos_token_ids
        self.warm_up = engine.warm_up
        self.abort = engine.abort
        self.has_unfinished = engine.has_unfinished
        self.gathering_s = engine.gathering_s
        self._num_blocks = engine.num_free_blocks
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
        """See Engine.compile_grammar. llama31_core takes masks, but makes none yet."""
        raise RequestRejectedError(f"this engine has no structured output; leave {grammar.kind} out")

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


def plan_engine(model_dir: Path, options: EngineOptions) -> EnginePlan:
    """What `load_engine` would build, from config.json alone. Raises llama31_core's errors for what cannot work."""
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    sizes = CoreOptions(**{name: value for name, value in chosen.items() if value is not None})
    return EnginePlan.make(ModelConfig.from_pretrained(model_dir), sizes)


def load_engine(plan: EnginePlan, weights: Path) -> CoreEngine:
    """The engine that a plan describes. Raises llama31_core's errors."""
    return CoreEngine(Engine.from_plan(plan, weights))
