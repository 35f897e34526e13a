"""By commands alone: our sample data -> conversations -> MindRecord -> finetune -> predict."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from llama31_ckpt.cli import main as ckpt
from llama31_core.checkpoint import open_weights, parameter_shapes, save_weights
from llama31_core.cli import main as core
from llama31_core.config import ModelConfig
from llama31_data.cli import main as data

RUN_FILE = Path(__file__).parents[1] / "configs" / "finetune_smollm2_135m.yaml"
SEQ_LENGTH = 128


@pytest.fixture(scope="module")
def small_model(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer over a small model with random weights, which learns within seconds."""
    path = tmp_path_factory.mktemp("small")
    values = ModelConfig.from_pretrained(smollm2_dir).model_dump()
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 128}
    config = ModelConfig(**values | sizes)
    config.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, path)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    save_weights(path, ((n, rng.normal(float(len(s) == 1), 0.02, s).astype(np.float32)) for n, s in shapes))
    return path


@pytest.fixture(scope="module")
def records(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sample = files("llama31_data") / "sample" / "instructions.json"
    conversations, records = folder / "conversations.json", folder / "sample.mindrecord"
    assert data(["convert", "--data_path", str(sample), "--output_path", str(conversations)]) == 0
    arguments = ["--input_glob", conversations, "--model_file", small_model, "--seq_length", SEQ_LENGTH]
    assert data(["preprocess", "--dataset_type", "qa", *map(str, arguments), "--output_file", str(records)]) == 0
    return records


def overrides(model: Path, records: Path, output: Path) -> list[str]:
    return [
        f"load_checkpoint={model}",
        f"train_dataset.data_loader.dataset_dir={records}",
        f"output_dir={output}",
        f"model.model_config.seq_length={SEQ_LENGTH}",
        "runner_config.epochs=5",
        "lr_schedule.learning_rate=1e-2",
    ]


def test_twenty_steps_lower_the_loss_and_the_result_predicts(
    small_model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = overrides(small_model, records, tmp_path)
    assert core(["finetune", str(RUN_FILE), *changes]) == 0
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r", loss: ([0-9.]+)", printed)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(np.log(49152), rel=0.05)  # random weights know nothing
    assert mean(losses[-5:]) < mean(losses[:5]) - 1.5

    trained = tmp_path / "model"
    assert ckpt(["verify", str(trained)]) == 0
    with open_weights(trained) as after, open_weights(small_model) as before:
        assert all(not np.array_equal(after.read(name), before.read(name)) for name in after.names())
    assert core(["predict", str(trained), "--prompt", "Name a colour.", "--max_tokens", "8"]) == 0

    assert core(["finetune", str(RUN_FILE), *changes]) == 1  # a result is never overwritten
    assert "exists" in capsys.readouterr().err


def test_an_adapter_is_trained_resumed_and_predicts(
    small_model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pet = "model.model_config.pet_config={lora_rank: 4, lora_alpha: 8, target_modules: '.*wq|.*w2'}"
    every = "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 1}]"
    for run in ("whole", "cut"):
        changes = [*overrides(small_model, records, tmp_path / run), pet, every, "runner_config.max_steps=3"]
        changes += ["do_eval=True", f"eval_dataset.data_loader.dataset_dir={records}", "eval_max_tokens=8"]
        changes += ["eval_prompts=['Name a colour.', 'What is 2 + 2?']"]
        if run == "cut":
            first = tmp_path / "whole" / "checkpoints" / "step_00000002"
            shutil.copytree(first, tmp_path / "cut" / "checkpoints" / first.name)
            changes.append("resume_training=True")
        assert core(["finetune", str(RUN_FILE), *changes]) == 0
    whole, cut = (tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert not (tmp_path / "whole" / "model").exists()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    after = [row["samples"] for row in rows if row["kind"] == "eval"][-1]
    assert len(after) == 2
    capsys.readouterr()
    use = ["--lora", f"own={tmp_path / 'cut' / 'adapter'}", "--adapter", "own"]
    assert core(["predict", str(small_model), *use, "--prompt", "Name a colour.", "--max_tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == after[0].strip()


def test_the_same_seed_trains_the_same_model(small_model: Path, records: Path, tmp_path: Path) -> None:
    weights = []
    for run in ("first", "second"):
        changes = overrides(small_model, records, tmp_path / run)
        assert core(["finetune", str(RUN_FILE), *changes, "runner_config.max_steps=3"]) == 0
        with open_weights(tmp_path / run / "model") as reader:
            weights.append({name: reader.read(name) for name in reader.names()})
    for name, first in weights[0].items():
        np.testing.assert_array_equal(first, weights[1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.model_config.seq_length=64", "the data has seq_length 128, the run 64"),
        ("model.model_config.hidden_size=576", "hidden_size is 576, the checkpoint's is 64"),
        ("runner_config.batch_size=4000", "less than one batch of 4000"),
        ("train_dataset.data_loader.dataset_dir=/nonexistent/x", "holds no MindRecord file"),
        ("load_checkpoint=/nonexistent/x", "does not exist"),
        ("load_checkpoint=", "load_checkpoint is empty"),
        ("lr_schedule.warmup_steps=1000", "keep one"),
        ("lr_schedule.learning_rate=.inf", "lr_schedule.learning_rate"),
        ("seed=5000000000", "seed"),
        ("output_dir=/proc/nowhere", "cannot be written"),
        ("runner_confg.epochs=1", "did you mean 'runner_config'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line_and_leaves_nothing(
    change: str, message: str, small_model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert core(["finetune", str(RUN_FILE), *overrides(small_model, records, output), change]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert not output.exists()
