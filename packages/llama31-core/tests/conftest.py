"""Models with random weights, and one of text whose answers can be worked out by hand, for this package's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
import yaml
from mindspore import Tensor
from mindspore.mindrecord import FileWriter

from llama31_core.checkpoint import parameter_shapes, save_weights
from llama31_core.commands import engine_options
from llama31_core.config import ModelConfig
from llama31_core.inference.engine import Engine
from llama31_core.inference.runner import GraphRunner, native_kernels_here
from llama31_core.inference.sum_runner import SumRunner
from llama31_core.kernels.native import NativeKernelsError, load_library
from llama31_core.model import Llama, PagedAttention


@pytest.fixture
def random_weights() -> Callable[..., dict[str, npt.NDArray[np.float32]]]:
    """Weights of every parameter, norms near 1, the rest of a size at which logits differ by a few units."""

    def build(config: ModelConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
        rng = np.random.default_rng(seed)
        weights = {}
        for name, shape in parameter_shapes(config).items():
            centre, spread = (1.0, 0.1) if len(shape) == 1 else (0.0, 1.0 / np.sqrt(shape[-1]))
            weights[name] = rng.normal(centre, spread, shape).astype(np.float32)
        return weights

    return build


@pytest.fixture(scope="session")
def native_kernels() -> None:
    """Skips tests of the native kernels where these cannot run, and says why."""
    try:
        load_library()
    except NativeKernelsError as error:
        pytest.skip(str(error))


@pytest.fixture
def build_runner() -> Callable[..., GraphRunner]:
    """A compiled model with given weights over a small cache; skips where native kernels are wanted and cannot run."""

    def build(
        config: ModelConfig,
        weights: dict[str, npt.NDArray[np.float32]],
        num_blocks: int = 64,
        block_size: int = 8,
        num_host_blocks: int = 0,
        native: bool = False,
        cache_dtype: ms.Type = ms.float32,
    ) -> GraphRunner:
        if native and not native_kernels_here():
            pytest.skip("no native kernels on this machine")
        llama = Llama(config, lambda: PagedAttention(config, num_blocks, block_size, cache_dtype))
        for name, parameter in llama.parameters_and_names():
            if not name.endswith("_cache"):
                parameter.set_data(Tensor(weights[name]))
        return GraphRunner(llama, num_blocks, block_size, num_host_blocks, native=native)

    return build


def write_records(path: Path, count: int, seed: int) -> None:
    """Random sequences of 16 tokens and one more."""
    writer = FileWriter(str(path))
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")})
    rng = np.random.default_rng(seed)
    for _ in range(count):
        row = rng.integers(0, ModelConfig.preset("tiny").vocab_size, 17).astype(np.int32)
        writer.write_raw_data([{"input_ids": row, "labels": row}])
    writer.commit()


@pytest.fixture
def run_file(tmp_path: Path, random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]]) -> Path:
    """A run of six steps of two micro-batches over 20 records: its second epoch begins within it. 7 are held out."""
    config = ModelConfig.preset("tiny")
    model, data = tmp_path / "source", tmp_path / "train.mindrecord"
    model.mkdir()
    config.save_pretrained(model)
    save_weights(model, random_weights(config).items())
    write_records(data, 20, seed=1)
    write_records(tmp_path / "held_out.mindrecord", 7, seed=2)
    path = tmp_path / "run.yaml"
    values = {
        "seed": 3,
        "load_checkpoint": str(model),
        "runner_config": {"epochs": 9, "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6},
        "lr_schedule": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train_dataset": {"data_loader": {"dataset_dir": str(data)}},
        "eval_dataset": {"data_loader": {"dataset_dir": str(tmp_path / "held_out.mindrecord"), "shuffle": False}},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_checkpoint_max": 2}],
        "model": {"model_config": {"seq_length": 16}},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model with random weights and a tokenizer of single bytes."""
    path = tmp_path / "model"
    path.mkdir()
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 16, "max_seq_len": 512}
    config = ModelConfig.build("bytes", vocab_size=258, **sizes)
    config.save_pretrained(path)
    rng = np.random.default_rng(0)
    save_weights(path, ((n, rng.normal(size=s).astype(np.float32)) for n, s in parameter_shapes(config).items()))
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in kept}
    spelling |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in kept)}
    special = [
        {"id": 256 + n, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for n, text in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    vocabulary = {spelling[byte]: byte for byte in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"
    values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return path


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[SumRunner]:
    """The runners of the engines that are built, in place of models."""
    made: list[SumRunner] = []

    def build(setup: engine_options.EngineSetup) -> Engine:
        made.append(SumRunner(setup.plan.config.vocab_size, setup.plan.cache.num_blocks, setup.plan.cache.block_size))
        return Engine(setup.plan.config, made[-1], setup.plan.options)

    monkeypatch.setattr(engine_options.EngineSetup, "build", build)
    return made
