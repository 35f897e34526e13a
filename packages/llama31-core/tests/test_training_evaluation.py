"""Held-out loss, the best checkpoint, the moving average and the metrics of a whole run, resumed too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.checkpoint import open_weights
from llama31_core.cli import main
from llama31_core.config import ModelConfig
from llama31_core.run_config import load_run_config
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.dataset import MindRecordDataset
from llama31_core.training.head import Objective
from llama31_core.training.metrics import read_metrics
from llama31_core.training.weights import TrainedWeights

CONFIG, DECAY = ModelConfig.preset("tiny"), 0.75


def weights(directory: Path) -> dict[str, npt.NDArray[np.float32]]:
    with open_weights(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


def held_out_loss(model: Path, data: Path) -> float:
    """Over all labels, from batches of other sizes than the run's."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ours = TrainedWeights(CONFIG, BlockwiseAttention)
    ours.load(weights(model).__getitem__)
    dataset = MindRecordDataset(data, CONFIG, seq_length=16, batch_size=7, seed=None, num_workers=1)
    batch = next(dataset.batches())
    return Backprop(ours, Objective(), "none").loss(batch) / (7 * 16)


def test_a_run_is_evaluated_averaged_and_recorded_and_resumes_all_of_it(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = [
        "do_eval=True",
        "eval_step_interval=2",
        f"runner_wrapper={{ema_decay: {DECAY}, label_smoothing: 0.1}}",
        "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 1, keep_checkpoint_max: 6}]",
        "tensorboard={}",
    ]
    assert main(["finetune", str(run_file), f"output_dir={whole}", *changes]) == 0
    rows = read_metrics(whole / "metrics.jsonl")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    data = tmp_path / "held_out.mindrecord"
    assert evaluations[0]["eval_loss"] == pytest.approx(held_out_loss(tmp_path / "source", data), rel=1e-5)
    assert evaluations[-1]["eval_loss"] == pytest.approx(held_out_loss(whole / "model", data), rel=1e-5)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]

    best = min(evaluations[1:], key=lambda row: row["eval_loss"])
    [kept] = (whole / "checkpoints").glob("best_*")
    assert kept.name == f"best_{best['step']:08d}"
    same = weights(whole / "checkpoints" / f"step_{best['step']:08d}")
    average = weights(tmp_path / "source")
    for name, value in weights(kept).items():
        np.testing.assert_array_equal(value, same[name])
    for step in range(1, 7):
        for name, value in weights(whole / "checkpoints" / f"step_{step:08d}").items():
            average[name] = DECAY * average[name] + (1 - DECAY) * value
    for name, value in weights(whole / "model_ema").items():
        np.testing.assert_allclose(value, average[name], atol=1e-6, err_msg=name)

    assert load_run_config(whole / "run.yaml") == load_run_config(run_file, [f"output_dir={whole}", *changes])
    assert list((whole / "tensorboard").glob("events.*"))

    (cut / "checkpoints").mkdir(parents=True)
    os.rename(whole / "checkpoints" / "step_00000004", cut / "checkpoints" / "step_00000004")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert main(["finetune", str(run_file), f"output_dir={cut}", *changes, "resume_training=True"]) == 0
    times = {"step_time_s", "eta_s", "memory_bytes", "elapsed_s", "tokens_per_s", "flops_per_s", "mfu", "is_best"}
    times |= {"peak_flops_per_s"}
    resumed = read_metrics(cut / "metrics.jsonl")
    assert [{k: v for k, v in row.items() if k not in times} for row in resumed] == [
        {k: v for k, v in row.items() if k not in times} for row in rows
    ]
    for result in ("model", "model_ema"):
        for name, value in weights(whole / result).items():
            np.testing.assert_array_equal(value, weights(cut / result)[name], err_msg=name)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_records(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["lr_schedule={learning_rate: 1.e+30}", "runner_wrapper.use_clip_grad=False"]
    output = tmp_path / "out"
    assert main(["finetune", str(run_file), f"output_dir={output}", *changes]) == 1
    [dump] = output.glob("stopped_at_step_*.json")
    assert f"which {dump} names" in capsys.readouterr().err
    stopped = json.loads(dump.read_text())
    assert stopped["step"] == int(dump.stem[-8:])
    assert len(stopped["records"]) == 4
    assert set(stopped["records"]) <= set(range(20))
    assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["do_eval=True", "eval_dataset="], "eval_dataset"),
        (["do_eval=True", "eval_dataset.data_loader.dataset_dir="], "dataset_dir is empty; set it, or do_eval=False"),
        (["do_eval=True", "eval_dataset.data_loader.dataset_dir=/none"], "holds no MindRecord file"),
        (["eval_step_interval=-2"], "eval_step_interval"),
        (["runner_wrapper.ema_decay=1"], "ema_decay"),
    ],
)
def test_evaluations_that_cannot_be_made_are_refused_before_the_first_step(
    changes: list[str], message: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(run_file), f"output_dir={tmp_path / 'out'}", *changes]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
