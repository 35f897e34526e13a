"""The engine: requests of token ids in, completions of token ids out, all of them batched as they come and go.

`generate` serves scripts; `add`, `step` and `abort` serve a server. One thread calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, RequestError
from llama31_core.inference.block_manager import BlockManager
from llama31_core.inference.request import Completion, FinishReason, Request, StepOutput
from llama31_core.inference.sampling import Sampler
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.scheduler import Batch, Scheduler


class Runner(Protocol):
    """Computes batches. The engine's tests use one whose logits can be worked out by hand."""

    num_blocks: int
    block_size: int

    def forward(
        self, token_ids_BT: list[list[int]], starts_B: list[int], block_tables: list[list[int]]
    ) -> npt.NDArray[np.float32]:
        """Store keys and values of B times T new tokens, the first at position `starts`, and give logits (B, V)
        of each last token."""


class Engine:
    """Continuous batching over a paged cache.

    Args:
        config: the model's architecture, for its vocabulary and end ids.
        runner: computes the batches.
        max_seq_len: tokens of prompt and completion of one request; at most the model's context and the cache.
        max_batch_size: requests that run at once; more wait.
        max_prefill_tokens: tokens of a prompt computed at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        *,
        max_seq_len: int | None = None,
        max_batch_size: int = 16,
        max_prefill_tokens: int = 512,
    ) -> None:
        self.config = config
        self._runner = runner
        in_cache = runner.num_blocks * runner.block_size
        limit = min(config.max_seq_len, in_cache)
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise ConfigError(
                f"max_seq_len is {max_seq_len}, allowed is 1 to {limit} "
                f"(context {config.max_seq_len}, cache {in_cache} tokens); enlarge the cache with num_blocks"
            )
        for name, value in (("max_batch_size", max_batch_size), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, allowed is >= 1")
        self.max_seq_len = max_seq_len or limit
        self._scheduler = Scheduler(
            BlockManager(runner.num_blocks, runner.block_size), max_batch_size, max_prefill_tokens
        )
        self._requests: dict[str, Request] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        *,
        max_seq_len: int | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_batch_size: int = 16,
        max_prefill_tokens: int = 512,
    ) -> Engine:
        """An engine for a model directory.

        Args:
            model_dir: holds config.json and the weights.
            max_seq_len: tokens of prompt and completion of one request; the most that context and cache hold if None.
            num_blocks: blocks of the cache; a gibibyte of cache if None.
            block_size: tokens that one block holds.
            max_batch_size: requests that run at once.
            max_prefill_tokens: tokens of a prompt computed at once.

        Raises:
            ConfigError: config.json is missing or not that of a Llama model.
            CheckpointError: the weights are missing, damaged or of another shape.
        """
        from llama31_core.inference.runner import GraphRunner  # MindSpore: seconds to import

        config = ModelConfig.from_pretrained(model_dir)
        runner = GraphRunner.from_pretrained(Path(model_dir), config, num_blocks=num_blocks, block_size=block_size)
        return cls(
            config,
            runner,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill_tokens,
        )

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that no request owns."""
        return self._scheduler.blocks.num_free

    @property
    def num_preemptions(self) -> int:
        """How often a request gave its blocks back to be computed again later."""
        return self._scheduler.num_preemptions

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the tokens to prefill that were found in the cache."""
        return self._scheduler.num_prefix_hit_tokens / max(1, self._scheduler.num_prefill_tokens)

    def warm_up(self) -> None:
        """Compile and run once, so that the first request does not wait for it."""
        self.generate([[0]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt; the results are in the order of the prompts.

        Raises:
            RequestError: a prompt that does not fit; none of them is started then.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one, or one a prompt")
        if self._requests:
            raise RequestError("generate runs alone; step the added requests to their end first, or abort them")
        pairs = enumerate(zip(prompts, each, strict=True))
        requests = {str(i): self._build_request(str(i), prompt, own) for i, (prompt, own) in pairs}
        reasons: dict[str, FinishReason] = {}
        try:
            for request in requests.values():
                self._enqueue(request)
            while len(reasons) < len(requests):
                ended = ((output.request_id, output.finish_reason) for output in self.step())
                reasons.update((name, reason) for name, reason in ended if reason is not None)
        finally:
            for name in requests:  # an interruption leaves nothing behind; what has ended is not there any more
                self.abort(name)
        return [
            Completion(r.output_ids, reasons[name], None if r.params.logprobs is None else r.output_logprobs)
            for name, r in requests.items()
        ]

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request.

        Raises:
            RequestError: the id is in use, the prompt is empty, has ids outside the vocabulary or does not fit.
        """
        self._enqueue(self._build_request(request_id, prompt_ids, params))

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks at once; false if there is none of that id."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.finish(request)
        return True

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def step(self) -> list[StepOutput]:
        """Compute the next batches and give what they added to each request."""
        return [output for batch in self._scheduler.schedule() for output in self._run(batch)]

    def _run(self, batch: Batch) -> list[StepOutput]:
        token_ids_BT = [request.uncached_ids(batch.num_tokens) for request in batch.requests]
        starts_B = [request.num_cached for request in batch.requests]
        logits_BV = self._runner.forward(token_ids_BT, starts_B, [request.block_table for request in batch.requests])
        # Drawn before anything is noted: if that fails, no request has changed and the step can be taken again.
        # A chunk of a prompt draws nothing: its logits predict a token that is known.
        complete = [request.num_cached + batch.num_tokens == request.num_tokens for request in batch.requests]
        rows = list(zip(batch.requests, logits_BV, complete, strict=True))
        drawn = [request.draw(logits_V) if is_complete else None for request, logits_V, is_complete in rows]
        outputs = []
        for (request, logits_V, _), token in zip(rows, drawn, strict=True):
            self._scheduler.computed(request, batch.num_tokens)
            if token is None:
                continue
            output = request.accept(token, logits_V)
            outputs.append(output)
            if output.finish_reason is not None:
                self._scheduler.finish(self._requests.pop(request.request_id))
        return outputs

    def _enqueue(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def _build_request(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> Request:
        if any(isinstance(token, bool) or not isinstance(token, (int, np.integer)) for token in prompt_ids):
            raise RequestError("the prompt holds something that is no integer; give token ids")
        prompt = [int(token) for token in prompt_ids]
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        outside = next((token for token in prompt if not 0 <= token < self.config.vocab_size), None)
        if outside is not None:
            raise RequestError(f"prompt id {outside} is outside the vocabulary (0 to {self.config.vocab_size - 1})")
        for name, largest in params.named_ids().items():
            if largest >= self.config.vocab_size:
                last = self.config.vocab_size - 1
                raise RequestError(f"{name} has id {largest}, outside the vocabulary (0 to {last})")
        room = self.max_seq_len - len(prompt)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if room < 1 or max_tokens > room:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} exceed the {self.max_seq_len} "
                f"tokens of a request; shorten the prompt, lower max_tokens or raise max_seq_len"
            )
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.config.eos_token_ids)
        return Request(request_id, prompt, params, max_tokens, stop_ids, Sampler(params, stop_ids))
