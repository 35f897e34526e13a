"""llama31_core's engine in the shape the server knows: the one module that imports llama31_core."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama31_core import Engine, SamplingParams, StepOutput
from llama31_core.errors import RequestError
from llama31_core.inference.options import EngineOptions as CoreOptions
from llama31_serve.server.engine import RequestRejectedError, Sampling
from llama31_serve.server.options import EngineOptions


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

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """See Engine.add."""
        try:
            params = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop_token_ids=sampling.stop_token_ids,
                ignore_eos=sampling.ignore_eos,
            )
            self._engine.add(request_id, prompt_ids, params)
        except RequestError as error:
            raise RequestRejectedError(str(error)) from error

    def step(self) -> Sequence[StepOutput]:
        """See Engine.step."""
        return self._engine.step()


def load_engine(model_dir: Path, options: EngineOptions) -> CoreEngine:
    """The engine of a model directory. Raises llama31_core's errors."""
    chosen = {
        "max_seq_len": options.max_seq_len,
        "max_batch_size": options.max_batch_size,
        "num_blocks": options.num_blocks,
        "block_size": options.block_size,
    }
    sizes = CoreOptions(**{name: value for name, value in chosen.items() if value is not None})
    return CoreEngine(Engine.from_pretrained(model_dir, sizes))
