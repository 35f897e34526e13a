"""Completions of sample prompts by weights in training: token ids in, token ids out, greedily.

The engine's model is pointed at the tensors that are trained, so it has no weights of its own; with LoRA the adapted
matrices are merged for the occasion.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mindspore as ms
from mindspore.nn.utils import no_init_parameters

from llama31_core.inference.engine import Engine
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner, native_kernels_here
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.values import clear_caches, is_cache
from llama31_core.model import Llama, PagedAttention
from llama31_core.training.lora import Lora, merged
from llama31_core.training.weights import TrainedWeights

_BLOCK_SIZE = 16


class SampleGenerator:
    """Completes the same prompts at every evaluation.

    Args:
        prompts: token ids of each.
        max_tokens: of a completion, which ends at the model's own end too.

    Raises:
        RequestError, ConfigError: a prompt that the model cannot complete.
    """

    def __init__(
        self, weights: TrainedWeights, lora: Lora | None, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> None:
        self._weights, self._lora = weights, lora
        self._prompts = [list(prompt) for prompt in prompts]
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0)
        blocks = sum(-(-(len(prompt) + max_tokens + 1) // _BLOCK_SIZE) for prompt in self._prompts)
        options = EngineOptions(num_blocks=blocks, block_size=_BLOCK_SIZE, max_batch_size=max(1, len(self._prompts)))
        self._plan = EnginePlan.make(weights.config, options, weights.precision)
        for prompt in self._prompts:
            self._plan.check_request(prompt, self._params)
        self._runner: GraphRunner | None = None

    def generate(self) -> tuple[tuple[int, ...], ...]:
        """A completion of each prompt."""
        runner = self._runner or self._build()
        self._runner = runner
        if self._lora is not None:
            self._point(runner.llama)
        runner.find_parameters()
        # A new engine: the blocks that the last one cached are of other weights.
        engine = Engine(self._plan.config, runner, self._plan.options)
        return tuple(tuple(c.token_ids) for c in engine.generate(self._prompts, self._params))

    def _build(self) -> GraphRunner:
        config, cache = self._weights.config, self._plan.cache
        with no_init_parameters():
            dtype = self._weights.compute_dtype
            core = partial(PagedAttention, config, cache.num_blocks, cache.block_size, dtype)
            llama = Llama(config, core, compute_dtype=dtype)
        clear_caches(llama)
        self._point(llama)
        ms.set_context(mode=ms.GRAPH_MODE)
        return GraphRunner(llama, cache.num_blocks, cache.block_size, native=native_kernels_here())

    def _point(self, llama: Llama) -> None:
        for name, parameter in llama.parameters_and_names():
            if not is_cache(name):
                parameter.set_data(merged(self._weights.tensors, name, self._lora))
