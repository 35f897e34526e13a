"""The contenders of tools/bench/inference: one process each, one model loaded, times of what it is asked over stdin.

    python tools/bench/inference_contenders.py llama31|transformers|llama.cpp MODEL THREADS

A line `prefill N` or `decode B N` in, seconds out: of N tokens up to the first logits, or of N more tokens for each of
B sequences, greedily, without their prompts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_PROMPT = 32
_VOCABULARY = 40_000  # ids that every model measured here has
_LONGEST = 4096
_LLAMA_CPP_ERROR = 4  # ggml's log level
_ids = np.random.default_rng(0)


class Contender(Protocol):
    """What is asked of each."""

    def prefill(self, length: int) -> float: ...

    def decode(self, batch: int, length: int) -> float: ...


def _prompt(length: int) -> list[int]:
    """Ids that no prompt before began with, so that no cache of prefixes helps."""
    ids: list[int] = _ids.integers(5, _VOCABULARY, length).tolist()
    return ids


class Llama31:
    """Our engine, its scheduler and sampler included."""

    def __init__(self, model: str, threads: int) -> None:
        from llama31_core import Engine, SamplingParams
        from llama31_core.inference.options import EngineOptions

        self._params = SamplingParams
        options = EngineOptions(num_blocks=_LONGEST, max_batch_size=64, max_prefill_batch_size=64)
        self._engine = Engine.from_pretrained(Path(model), options=options)
        self._serial = 0

    def prefill(self, length: int) -> float:
        start = time.perf_counter()
        self._engine.generate([_prompt(length)], self._params(max_tokens=1, temperature=0))
        return time.perf_counter() - start

    def decode(self, batch: int, length: int) -> float:
        params = self._params(max_tokens=length + 1, min_tokens=length + 1, temperature=0)
        for _ in range(batch):
            self._serial += 1
            self._engine.add(str(self._serial), _prompt(_PROMPT), params)
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in self._engine.step()}
        start, tokens = time.perf_counter(), 0
        while self._engine.has_unfinished():
            tokens += sum(len(output.token_ids) for output in self._engine.step())
        return (time.perf_counter() - start) * batch * length / tokens


class Transformers:
    """Hugging Face transformers over torch, with its key-value cache and no more than a loop around the model."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        path, _, dtype = model.partition(":")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def _prompts(self, batch: int, length: int) -> Any:
        return self._torch.tensor([_prompt(length) for _ in range(batch)])

    def prefill(self, length: int) -> float:
        ids = self._prompts(1, length)
        start = time.perf_counter()
        self._model(ids, logits_to_keep=1).logits.argmax()
        return time.perf_counter() - start

    def decode(self, batch: int, length: int) -> float:
        out = self._model(self._prompts(batch, _PROMPT), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(length):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(ids, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp by its C interface: batches of several sequences over one unified cache."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._log = llama_cpp.llama_log_callback(_print_errors)  # called from C as long as this lives
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 2 * _LONGEST, _LONGEST, 512, 64
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_LONGEST, 0, 1)

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (id, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        if self._c.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")

    def _likeliest(self, index: int) -> int:
        logits = self._c.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def prefill(self, length: int) -> float:
        self._clear()
        tokens = [(token, at, 0, at == length - 1) for at, token in enumerate(_prompt(length))]
        start = time.perf_counter()
        self._run(tokens)
        self._likeliest(length - 1)
        return time.perf_counter() - start

    def decode(self, batch: int, length: int) -> float:
        self._clear()
        prompts = [_prompt(_PROMPT) for _ in range(batch)]
        ends = [(row, at) for row in range(batch) for at in range(_PROMPT)]
        self._run([(prompts[row][at], at, row, at == _PROMPT - 1) for row, at in ends])
        last = [self._likeliest((row + 1) * _PROMPT - 1) for row in range(batch)]
        start = time.perf_counter()
        for step in range(length):
            self._run([(token, _PROMPT + step, row, True) for row, token in enumerate(last)])
            last = [self._likeliest(row) for row in range(batch)]
        return time.perf_counter() - start


def _print_errors(level: int, text: bytes, _: object) -> None:
    if level >= _LLAMA_CPP_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


_CONTENDERS: dict[str, Callable[[str, int], Contender]] = {
    "llama31": Llama31,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def main() -> None:
    """Load, then answer lines until stdin ends."""
    _, name, model, threads = sys.argv
    contender = _CONTENDERS[name](model, int(threads))
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(getattr(contender, what)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
