"""After the warm-up nothing is compiled any more, whatever comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mindspore.graph.api import _CellGraphExecutor

from llama31_core.checkpoint import save_weights
from llama31_core.config import ModelConfig
from llama31_core.inference.batch import BlockMove
from llama31_core.inference.engine import Engine
from llama31_core.inference.native_llama import NativeLlama
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.lora.adapter import PREFIX

CONFIG = ModelConfig(vocab_size=97, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=96)
DRAFT = ModelConfig(vocab_size=97, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=96)
SIZES: dict[str, Any] = {"num_blocks": 30, "block_size": 4, "max_batch_size": 6, "max_prefill_tokens": 24}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that have been compiled since the test began."""
    seen: list[str] = []
    compile_graph = _CellGraphExecutor.compile

    def note(self: Any, obj: Any, *args: Any, **kwargs: Any) -> tuple[str, bool]:
        phase, is_new = compile_graph(self, obj, *args, **kwargs)
        if is_new:
            seen.append(f"{type(obj).__name__}: {phase}")
        return phase, is_new

    monkeypatch.setattr(_CellGraphExecutor, "compile", note)
    return seen


@pytest.fixture
def model_dirs(random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]], tmp_path: Path) -> tuple[Path, Path]:
    """A model and one to guess for it."""
    for name, config in (("model", CONFIG), ("draft", DRAFT)):
        (tmp_path / name).mkdir()
        config.save_pretrained(tmp_path / name)
        save_weights(tmp_path / name / "model.safetensors", random_weights(config).items())
    return tmp_path / "model", tmp_path / "draft"


def save_adapter(path: Path) -> Path:
    """A LoRA adapter of the queries."""
    path.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    name = PREFIX + "model.layers.0.self_attn.q_proj.lora_{}.weight"
    matrices = {"A": rng.normal(size=(2, 32)), "B": rng.normal(size=(32, 2))}
    stored = [(name.format(side), values.astype(np.float32)) for side, values in matrices.items()]
    save_weights(path / "adapter_model.safetensors", stored)
    return path


def check_kernels(engine: Engine, kernels: str) -> None:
    """Skip where the machine has no native kernels."""
    assert isinstance(engine._runner, GraphRunner)
    is_native = isinstance(engine._runner._net, NativeLlama)
    if kernels == "native" and not is_native:
        pytest.skip("no native kernels on this machine")
    assert is_native == (kernels == "native")


def some_requests(rng: np.random.Generator, count: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Prompts of any length under any parameters."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2},
        {"seed": 2, "n": 3},
        {"temperature": 0, "num_beams": 3, "n": 2},
        {"temperature": 0, "prompt_logprobs": 1, "min_tokens": 2},
    ]
    for index in range(count):
        prompt = rng.integers(0, 97, int(rng.integers(1, 60))).tolist()
        max_tokens = int(rng.integers(1, 8 if index % 5 == 3 else 30))
        yield prompt, SamplingParams(max_tokens=max_tokens, **kinds[index % 5])


def run(engine: Engine, requests: Iterator[tuple[list[int], SamplingParams]]) -> None:
    """Requests that come while others run, with an adapter in turns if there is one; some are aborted."""
    adapters = [None, *(adapter.name for adapter in engine.adapters)]
    for index, (prompt, params) in enumerate(requests):
        engine.add(str(index), prompt, params, adapter=adapters[index % len(adapters)])
        if index % 3 == 0:
            engine.step()
        if index % 7 == 6:
            engine.abort(str(index - 2))
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None


GUESSES: dict[str, Any] = {"num_host_blocks": 40, "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("kernels", "options", "drafts"),
    [
        ("portable", GUESSES, True),
        ("portable", {"max_loras": 2, "max_lora_rank": 2}, False),
        ("native", {}, False),
        ("native", GUESSES, False),
        ("native", GUESSES, True),
        ("native", {**GUESSES, "kv_cache_dtype": "bfloat16"}, True),
    ],
)
def test_nothing_is_compiled_after_the_warm_up(
    kernels: str,
    options: dict[str, Any],
    drafts: bool,
    model_dirs: tuple[Path, Path],
    compilations: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels == "portable":
        monkeypatch.setenv("LLAMA31_NATIVE_KERNELS", "0")
    model, draft = model_dirs
    engine = Engine.from_pretrained(model, EngineOptions(**SIZES, **options), draft_model_dir=draft if drafts else None)
    check_kernels(engine, kernels)
    engine.warm_up()
    assert bool(compilations) == (kernels == "portable")  # the native kernels need no graph at all
    compilations.clear()
    if "max_loras" in options:
        engine.load_adapter("tuned", save_adapter(model / "adapter"))
    run(engine, some_requests(np.random.default_rng(0), 15))
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_drafted_tokens > 0) == ("num_speculative_tokens" in options)
    assert (stats.num_swapped_in > 0) == ("num_host_blocks" in options)
    engine._runner.move_blocks([BlockMove("clear", 3, 3), BlockMove("clear", 5, 5)])  # what a failed request leads to
    assert compilations == []
    assert engine.num_free_blocks == SIZES["num_blocks"]
