"""From flags to an engine, in two steps: what can be refused is refused before MindSpore and the weights are loaded."""

from __future__ import annotations

import argparse
import atexit
import os
from dataclasses import dataclass, field
from pathlib import Path

from llama31_core.commands.interrupts import importing_mindspore
from llama31_core.commands.model_source import ModelSource
from llama31_core.errors import ConfigError
from llama31_core.inference.engine import Engine
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.options import EngineOptions
from llama31_core.lora.adapter import Adapter, read_adapter
from llama31_core.lora.table import adaptable_shapes, check_fits, not_loaded
from llama31_core.parallel.mesh import ParallelConfig
from llama31_tokenizer import Tokenizer

_FLAGS = {
    "max_seq_len": "tokens of prompt and answer (what context and cache hold)",
    "block_size": "tokens that one block of the cache holds (16)",
    "num_blocks": "blocks of the cache",
    "cache_memory_bytes": "size of the cache, instead of --num_blocks (a gibibyte)",
    "num_host_blocks": "blocks of host memory for requests that had to make room (0)",
    "max_batch_size": "requests that run at once (16)",
    "max_prefill_tokens": "prompt tokens computed in one step (512)",
    "num_speculative_tokens": "tokens guessed ahead (0)",
}
_CACHE_TYPE = "type of keys and values: float32, bfloat16, or auto, which follows the weights (auto)"


@dataclass(frozen=True)
class EngineSetup:
    """A checked engine that is not built yet.

    Attributes:
        plan: sizes and limits.
        weights: model directory or weight file.
        tokenizer: the model's.
        adapters: those to load, by name.
        draft_model_dir: guesses tokens.
        parallel: the ranks that it runs over.
        run_file: what messages call the file that says so.
    """

    plan: EnginePlan
    weights: Path
    tokenizer: Tokenizer
    adapters: dict[str, Adapter]
    draft_model_dir: Path | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run_file: str = ""

    def check_adapter(self, name: str | None) -> None:
        """See that an adapter that a request names is one of those to load.

        Raises:
            RequestError: it is not.
        """
        if name is not None and name not in self.adapters:
            raise not_loaded(name, self.adapters)

    def build(self) -> Engine:
        """Import MindSpore, read the weights and load the adapters."""
        with importing_mindspore():
            import mindspore  # noqa: F401  here, so that an interruption cannot leave it half imported
        if self.parallel.world_size > 1:
            return self._join()
        engine = Engine.from_plan(self.plan, self.weights, draft_model_dir=self.draft_model_dir)
        for name, adapter in self.adapters.items():
            engine.load_adapter(name, adapter)
        return engine

    def follow(self) -> None:
        """On a rank that does not schedule: compute what rank 0 says until it ends, and end the process too."""
        leads = os.environ.get("RANK_ID", "0") == "0" and os.environ.get("MS_ROLE") != "MS_SCHED"
        if self.parallel.world_size > 1 and not leads:
            self.build()

    def _join(self) -> Engine:
        from llama31_core.inference.parallel_runner import Follower, join

        joined = join(self.plan, self.parallel, self.weights, self.run_file)
        if isinstance(joined, Follower):
            joined.follow()
            raise SystemExit(0)
        atexit.register(joined.close)
        return Engine(self.plan.config, joined, self.plan.options)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags of the engine."""
    group = parser.add_argument_group("engine")
    for name, text in _FLAGS.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group.add_argument("--kv_cache_dtype", default="auto", metavar="TYPE", help=_CACHE_TYPE)
    group.add_argument("--draft_model", type=Path, metavar="DIR", help="a smaller model that guesses the tokens")
    text = "a PEFT adapter to load; repeatable with names, DIR alone is used for all that is asked"
    group.add_argument("--lora", action="append", default=[], type=_as_lora, metavar="[NAME=]DIR", help=text)
    group.add_argument("--adapter", metavar="NAME", help="which of them to use where nothing else is said")


def plan_engine(arguments: argparse.Namespace, source: ModelSource, **more: int) -> EngineSetup:
    """Check what a command line asks for; `more` are options for those that are not given.

    An adapter without a name becomes `arguments.adapter`, unless another one is asked for.

    Raises:
        Llama31Error: sizes that do not fit each other or the memory, a draft model or an adapter that does not fit.
    """
    given = {name: getattr(arguments, name) for name in _FLAGS if getattr(arguments, name) is not None}
    directories = _name_adapters(arguments)
    adapters = {name: read_adapter(directory) for name, directory in directories.items()}
    slots = {"max_loras": len(adapters), "max_lora_rank": max(a.rank for a in adapters.values())} if adapters else {}
    if "cache_memory_bytes" in given:
        more.pop("num_blocks", None)  # both say how large the cache is
    options = EngineOptions(kv_cache_dtype=arguments.kv_cache_dtype, **{**more, **slots, **given})
    for adapter in adapters.values():
        check_fits(adapter, adaptable_shapes(source.config), options.max_lora_rank)
    ranks = source.parallel.world_size
    plan = EnginePlan.for_weights(source.config, options, source.weights, source.precision, num_ranks=ranks)
    if arguments.draft_model is not None:
        plan.for_draft(arguments.draft_model)
    if ranks > 1 and (adapters or arguments.draft_model is not None):
        what = "--lora" if adapters else "--draft_model"
        raise ConfigError(f"{what} is for one device, {source.run_file} asks for {ranks}")
    setup = EngineSetup(
        plan, source.weights, source.tokenizer, adapters, arguments.draft_model, source.parallel, source.run_file
    )
    setup.check_adapter(arguments.adapter)
    return setup


def _name_adapters(arguments: argparse.Namespace) -> dict[str, Path]:
    """The directory of each adapter; one without a name has its directory's, and is used where nothing else is said."""
    if len(arguments.lora) == 1 and arguments.lora[0][0] is None:
        [(_, alone)] = arguments.lora
        name = alone.resolve().name
        arguments.adapter = arguments.adapter or name
        return {name: alone}
    for name, directory in arguments.lora:
        if name is None:
            raise ConfigError(f"--lora {directory} has no name; give each of several adapters its own, --lora NAME=DIR")
    directories = dict(arguments.lora)
    if len(directories) < len(arguments.lora):
        raise ConfigError("--lora gives one name to two adapters; give each its own")
    return directories


def _as_lora(text: str) -> tuple[str | None, Path]:
    name, equals, directory = text.partition("=")
    if name and not equals:
        return None, Path(text)
    if not (name and directory):
        raise argparse.ArgumentTypeError(f"{text!r} is neither NAME=DIR nor DIR")
    return name, Path(directory)
