"""What a run tells of itself, from reports to files and a picture. No MindSpore."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from llama31_core.cli import main
from llama31_core.config import ModelConfig
from llama31_core.errors import DatasetError
from llama31_core.run_config import RunConfig
from llama31_core.training.flops import StepFlops
from llama31_core.training.metrics import MetricsFile, read_metrics
from llama31_core.training.report import EvalReport, StepReport
from llama31_core.training.run_plan import Pace, RunPlan

STEP = StepReport(
    epoch=2,
    step=7,
    num_steps=20,
    loss=1.25,
    learning_rate=3e-4,
    grad_norm=0.5,
    step_time_s=2.0,
    num_tokens=1000,
    num_label_tokens=300,
    flops=4e11,
    peak_flops_per_s=8e11,
    memory_bytes=3_700_000_000,
    eta_s=3725.0,
    loss_scale=1.0,
)


def test_a_step_is_one_line_with_all_figures() -> None:
    assert str(STEP) == (
        "epoch: 2, step: [7/20], loss: 1.2500, lr: 3.000e-04, overflow: False, loss_scale: 1, global_norm: 0.500, "
        "per_step_time: 2000ms, 500 tokens/s/device, 300 label tokens, 0.200 TFLOP/s, MFU 25.0%, memory 3.70 GB, "
        "ETA 1:02:05"
    )


def test_an_evaluation_is_one_line() -> None:
    report = EvalReport(step=5, num_steps=20, loss=2.0, num_label_tokens=90, elapsed_s=0.26, is_best=True)
    assert str(report) == (
        "evaluation after step [5/20]: loss: 2.0000, perplexity: 7.389 over 90 label tokens in 0.3 s, the best so far"
    )


def test_operations_are_six_a_weight_and_twelve_a_pair() -> None:
    """PaLM's count, worked out by hand for a model of known size: SmolLM2 has 106,168,320 weights in its layers'
    matrices and 28,311,552 in the tied one."""
    config = ModelConfig.preset("smollm2-135m")
    flops = StepFlops.of(config)
    assert flops.per_token == 6 * 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert flops.per_label == 6 * 49152 * 576
    assert flops.count(0, 0, 10) == 10 * 12 * 30 * 576
    frozen = StepFlops.of(config, trains_weights=False)
    assert frozen.per_token == flops.per_token * 2 / 3


def test_metrics_of_steps_that_are_taken_again_go(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, 0, decode=lambda ids: "-".join(map(str, ids)))
    for step in (1, 2, 3):
        first.on_step(replace(STEP, step=step))
    first.on_evaluation(EvalReport(3, 20, 2.0, 90, 0.1, samples=((1, 2), (3,))))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # as a kill leaves it
    assert [(row["kind"], row["step"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        ("step", 1), ("step", 2), ("step", 3), ("eval", 3),
    ]  # fmt: skip
    MetricsFile(tmp_path, 2).on_step(replace(STEP, step=3, loss=9.0))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (rows[-1]["loss"], rows[-1]["mfu"], rows[-1]["tokens_per_s"]) == (9.0, 0.25, 500.0)
    MetricsFile(tmp_path, 0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_samples_are_written_as_text(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0, decode=lambda ids: "-".join(map(str, ids)))
    metrics.on_evaluation(EvalReport(3, 20, 2.0, 90, 0.1, samples=((1, 2), (3,))))
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert row["samples"] == ["1-2", "3"]
    assert row["perplexity"] == pytest.approx(7.389, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n{}\n", "metrics.jsonl:1 is no JSON"),
        ("{}\n", "1 is no line of metrics"),
        ("1\n", "1 is no line of metrics"),
    ],
)
def test_a_file_that_is_no_metrics_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_metrics(tmp_path / "metrics.jsonl")


def test_plot_draws_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsFile(tmp_path, 0)
    for step in range(1, 61):
        metrics.on_step(replace(STEP, step=step, loss=5 / step))
    metrics.on_evaluation(EvalReport(60, 60, 2.0, 90, 0.1))
    assert main(["plot", str(tmp_path)]) == 0
    content = (tmp_path / "metrics.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1320, 840)
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "none")]) == 1
    assert "give the output_dir of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 0, "eval_loss": 1}) + "\n")
    assert main(["plot", str(tmp_path)]) == 1
    assert "there is no step in the metrics" in capsys.readouterr().err


def plan(**values: object) -> RunPlan:
    run = RunConfig.model_validate({"lr_schedule": {"learning_rate": 1e-3}, **values})
    return RunPlan.of(run, 10, "run.yaml")


def test_evaluations_are_due_by_steps_or_by_epochs() -> None:
    runner = {"epochs": 3, "gradient_accumulation_steps": 2}  # 5 steps an epoch
    by_epochs = plan(runner_config=runner, do_eval=True)
    assert [step for step in range(16) if by_epochs.evaluates_after(step)] == [0, 5, 10, 15]
    by_steps = plan(runner_config=runner, do_eval=True, eval_step_interval=4)
    assert [step for step in range(16) if by_steps.evaluates_after(step)] == [0, 4, 8, 12, 15]
    assert not any(plan(runner_config=runner).evaluates_after(step) for step in range(16))


def test_the_first_step_which_compiles_says_nothing_of_the_others() -> None:
    pace = Pace()
    assert pace.eta_s(100.0, 10) == pytest.approx(1000)
    assert pace.eta_s(2.0, 9) == pytest.approx(18)
    assert pace.eta_s(3.0, 8) == pytest.approx(8 * 2.2)
