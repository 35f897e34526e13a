"""The engine: requests of token ids in, completions of token ids out, all of them batched as they come and go.

`generate` serves scripts; `add`, `step` and `abort` serve a server. One thread calls it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.read_ahead import read_ahead
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, RequestError
from llama31_core.inference.batch import Runner
from llama31_core.inference.block_manager import BlockManager
from llama31_core.inference.cache import SequenceCache
from llama31_core.inference.cache_plan import largest_request
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.execution import Execution
from llama31_core.inference.limits import RequestLimits
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.progress import Group
from llama31_core.inference.request import Completion, Request, StepOutput
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.scheduler import Scheduler, urgency
from llama31_core.inference.speculation import NgramProposer, Proposer
from llama31_core.inference.stats import EngineStats
from llama31_core.lora.adapter import Adapter, read_adapter
from llama31_core.lora.table import AdapterStore, AdapterTable, LoadedAdapter


class Engine:
    """Continuous batching over a paged cache.

    Args:
        config: the model's architecture, for its vocabulary and end ids.
        runner: computes the batches.
        options: sizes and limits; those of the cache are the runner's.
        proposer: guesses tokens ahead, if `options.num_speculative_tokens` asks for it; prompt lookup if None.
        adapters: where the matrices of adapters go; None if the runner has no slots for any.
        clock: seconds that only go forward.

    Raises:
        ConfigError: `max_seq_len` is more than the model's context and the runner's cache hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        options: EngineOptions | None = None,
        *,
        proposer: Proposer | None = None,
        adapters: AdapterStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.options = options = options or EngineOptions()
        self._runner = runner
        self._clock = clock
        self.max_seq_len = largest_request(config, options.max_seq_len, runner.num_blocks, runner.block_size)
        self._limits = RequestLimits(config, options, self.max_seq_len, runner.num_blocks, runner.block_size)
        self._adapters = AdapterTable(config, adapters, options.max_loras, options.max_lora_rank)
        self._scheduler = Scheduler(
            SequenceCache(BlockManager(runner.num_blocks, runner.block_size), runner.num_host_blocks),
            options.max_batch_size,
            options.max_prefill_tokens,
            options.max_prefill_batch_size,
            options.max_queue_delay_s,
            options.num_speculative_tokens,
        )
        guesses = options.num_speculative_tokens > 0
        self._execution = Execution(runner, self._scheduler, (proposer or NgramProposer()) if guesses else None)

    @staticmethod
    def plan(model_dir: str | Path, options: EngineOptions | None = None) -> EnginePlan:
        """What `from_pretrained` would build: to refuse what cannot work before MindSpore is imported and weights load.

        Raises:
            ConfigError: config.json is missing or not that of a Llama model, or memory does not suffice.
            CheckpointError: the weights are missing, damaged or of another shape.
        """
        config = ModelConfig.from_pretrained(model_dir)
        return EnginePlan.for_weights(config, options or EngineOptions(), Path(model_dir))

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        options: EngineOptions | None = None,
        *,
        max_seq_len: int | None = None,
        num_blocks: int | None = None,
        block_size: int | None = None,
        max_batch_size: int | None = None,
        max_prefill_tokens: int | None = None,
        draft_model_dir: str | Path | None = None,
    ) -> Engine:
        """An engine for a model directory.

        Args:
            model_dir: holds config.json and the weights.
            options: all sizes and limits.
            max_seq_len, num_blocks, block_size, max_batch_size, max_prefill_tokens: for use without `options`.
            draft_model_dir: a smaller model of the same vocabulary, to guess tokens; prompt lookup if None.

        Raises:
            ConfigError: config.json is missing or not that of a Llama model, memory does not suffice, or `options` are
                given and one of the others too.
            CheckpointError: the weights are missing, damaged or of another shape.
        """
        sizes: dict[str, Any] = {"max_seq_len": max_seq_len, "num_blocks": num_blocks, "block_size": block_size}
        sizes |= {"max_batch_size": max_batch_size, "max_prefill_tokens": max_prefill_tokens}
        given = {name: value for name, value in sizes.items() if value is not None}
        if options is not None and given:
            raise ConfigError(f"options and {', '.join(given)} are given; put {', '.join(given)} into the options")
        plan = cls.plan(model_dir, options or EngineOptions(**given))
        return cls.from_plan(plan, model_dir, draft_model_dir=draft_model_dir)

    @classmethod
    def from_plan(cls, plan: EnginePlan, weights: str | Path, *, draft_model_dir: str | Path | None = None) -> Engine:
        """The engine that a plan describes; the arguments and errors are those of `from_pretrained`.

        `weights` may be a file without a configuration beside it, as the plan has that.
        """
        draft = None if draft_model_dir is None else plan.for_draft(Path(draft_model_dir))
        with read_ahead(Path(weights)):
            from llama31_core.inference.runner import GraphRunner  # MindSpore: seconds to import

        runner = GraphRunner.from_pretrained(Path(weights), plan.config, plan.cache, plan.options, plan.precision)
        if draft is None or draft_model_dir is None:
            return cls(plan.config, runner, plan.options, adapters=runner.adapters)
        from llama31_core.inference.draft_model import DraftModelProposer

        sizes = (draft.config, draft.cache, draft.options, draft.precision)
        proposer = DraftModelProposer(GraphRunner.from_pretrained(Path(draft_model_dir), *sizes), runner)
        return cls(plan.config, runner, plan.options, proposer=proposer, adapters=runner.adapters)

    @property
    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """The adapters that requests can ask for."""
        return self._adapters.loaded

    def load_adapter(self, name: str, adapter: str | Path | Adapter) -> LoadedAdapter:
        """Load a LoRA adapter beside the model; requests choose it by its name. Compiles nothing.

        Args:
            name: what requests call it.
            adapter: a directory in PEFT's form, or what `read_adapter` gave of one.

        Raises:
            ConfigError: the name is taken, or `max_loras` adapters are loaded.
            CheckpointError: no adapter, or one that does not fit the model or `max_lora_rank`.
        """
        return self._adapters.load(name, adapter if isinstance(adapter, Adapter) else read_adapter(adapter))

    def unload_adapter(self, name: str) -> None:
        """Make room for another adapter.

        Raises:
            RequestError: no such adapter, or a request that has not ended uses it.
        """
        groups = self._execution.groups.values()
        self._adapters.unload(name, lambda adapter: any(group.request.adapter == adapter for group in groups))

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that no request owns."""
        return self._scheduler.cache.blocks.num_free

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to make room."""
        return self._scheduler.num_preemptions

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the tokens to prefill that were found in the cache."""
        return self.stats().prefix_hit_rate

    def stats(self) -> EngineStats:
        """Counters since the engine was made, and what it holds now."""
        scheduler, cache, execution = self._scheduler, self._scheduler.cache, self._execution
        return EngineStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_free_blocks=cache.blocks.num_free,
            num_free_host_blocks=cache.num_free_host,
            num_preemptions=scheduler.num_preemptions,
            num_swapped_out=cache.num_swapped_out,
            num_swapped_in=cache.num_swapped_in,
            num_prefill_tokens=cache.num_entered_tokens,
            num_prefix_hit_tokens=cache.num_hit_tokens,
            num_drafted_tokens=execution.progress.num_drafted,
            num_accepted_tokens=execution.progress.num_accepted,
            num_failed_requests=execution.num_failed,
            num_failed_passes_in_a_row=execution.num_failed_passes_in_a_row,
        )

    def warm_up(self) -> None:
        """Compile and run everything once, so that no request waits for it."""
        self.generate([[0]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        self._execution.warm_up_moves()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Complete every prompt; the results are in the order of the prompts, n of each. `adapter` names one for all.

        Raises:
            RequestError: a prompt that does not fit; none of them is started then.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one, or one a prompt")
        if self._execution.groups:
            raise RequestError("generate runs alone; step the added requests to their end first, or abort them")
        pairs = enumerate(zip(prompts, each, strict=True))
        requests = [self._build_request(str(index), prompt, own, 0, adapter) for index, (prompt, own) in pairs]
        parts: dict[tuple[str, int], list[StepOutput]] = {}
        try:
            for request in requests:
                self._execution.add(Group.start(request))
            while self._execution.groups:
                for output in self._execution.step(math.inf):  # nobody else will come: there is nothing to wait for
                    parts.setdefault((output.request_id, output.index), []).append(output)
        finally:
            for request in requests:  # an interruption leaves nothing behind; what has ended is not there any more
                self.abort(request.request_id)
        return [_join(parts[request.request_id, index]) for request in requests for index in range(request.params.n)]

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> None:
        """Queue a request; a lower priority number is served first (see `EngineOptions.priority_step_s`).

        Raises:
            RequestError: the id is in use, there is no such adapter, the prompt is empty, has ids outside the
                vocabulary or does not fit.
        """
        if request_id in self._execution.groups:
            raise RequestError(f"request id {request_id!r} is in use")
        self._execution.add(Group.start(self._build_request(request_id, prompt_ids, params, priority, adapter)))

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks at once; false if there is none of that id."""
        return self._execution.drop(request_id)

    def has_unfinished(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._execution.groups)

    def gathering_s(self) -> float:
        """How long `step` would have nothing to do because new requests wait for others (`max_queue_delay_s`)."""
        return 0.0 if self._scheduler.running else self._scheduler.gathering_s(self._clock())

    def step(self) -> list[StepOutput]:
        """Compute the next batches and give what they added to each request.

        A request that fails ends with the reason "error" and harms no other: a batch that fails is computed again, one
        request at a time.
        """
        return self._execution.step(self._clock())

    def _build_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, priority: int, adapter: str | None
    ) -> Request:
        prompt, max_tokens = self._limits.check(prompt_ids, params)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.config.eos_token_ids)
        now_s = self._clock()
        rank = urgency(now_s, priority, self.options.priority_step_s)
        loaded = None if adapter is None else self._adapters.find(adapter)
        return Request(request_id, prompt, params, max_tokens, stop_ids, now_s, rank, loaded)


def _join(parts: list[StepOutput]) -> Completion:
    last = parts[-1]
    assert last.finish_reason is not None
    return Completion(
        [token for part in parts for token in part.token_ids],
        last.finish_reason,
        None if last.logprobs is None else [report for part in parts for report in part.logprobs or []],
        last.index,
        last.error,
        parts[0].prompt_logprobs,
        last.score,
    )
