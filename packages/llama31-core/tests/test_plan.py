"""The plan of a run: counted by hand, beside published figures and a process's peak memory, and its search."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from llama31_core.cli import main
from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig, plan_shards
from llama31_core.plan import (
    PredictWorkload,
    TrainingPlan,
    TrainWorkload,
    find_device,
    plan_prediction,
    plan_training,
)
from llama31_core.plan.published import PUBLISHED, compare
from llama31_core.plan.search import search_layouts
from llama31_core.run_config import load_run_config
from llama31_core.training.pieces import chunk_size, query_blocks, query_key_pairs
from llama31_core.training.run_plan import RunPlan

NPU = find_device("ascend910b")
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 1376, "max_seq_len": 1024,
}  # fmt: skip


def published_plan(index: int, **changes: Any) -> TrainingPlan:
    published = PUBLISHED[index]
    dp, cp, tp, pp = published.axes
    parallel = ParallelConfig(dp=dp, cp=cp, tp=tp, pp=pp, sequence_parallel=tp > 1, shard_optimizer=dp > 1)
    work = TrainWorkload(
        ModelConfig.preset(published.preset), parallel, published.seq_length, 1, 256 if pp > 1 else 1, "none"
    )
    return plan_training(replace(work, **changes), NPU)


def test_weights_and_optimiser_are_those_of_the_layouts_shards() -> None:
    parallel = ParallelConfig(dp=2, tp=4, pp=2, shard_optimizer=True)
    work = TrainWorkload(ModelConfig.preset("llama3.1-70b"), parallel, 8192, 1, 8, "none")
    for stage, rank in ((0, 0), (1, 8)):
        memory = plan_training(work, NPU).stages[stage].memory.parts
        shards = plan_shards(work.config, parallel, rank).values()
        assert memory["weights"] == sum(prod(s.shape) * (2 if len(s.shape) > 1 else 4) for s in shards)
        states = (prod(part.stop - part.start for part in s.optimizer_slices) for s in shards)
        assert memory["optimiser"] == 8 * sum(states)


def test_activations_counted_by_hand() -> None:
    """8B, one sequence of 8192 in bfloat16: input, q, k, v, mixed, h, gate and up of 32 layers."""
    plan = published_plan(0)
    each = 4096 + 4096 + 2 * 1024 + 4096 + 4096 + 2 * 14336
    assert plan.largest.memory.moment == "the beginning of the backward pass"
    assert plan.largest.memory.parts["activations"] == 2 * 8192 * 32 * each
    full = published_plan(0, recompute="full", micro_batches=2)
    assert full.largest.memory.parts["activations"] <= 2 * 8192 * 32 * 4096


def test_stages_hold_as_many_micro_batches_as_are_in_flight() -> None:
    stages = published_plan(1).stages
    kept = [stage.memory.parts["activations"] for stage in stages]
    assert [size // kept[-1] for size in kept] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_traffic_counted_by_hand() -> None:
    plan = published_plan(0)
    sent = {part.axis: part.bytes_per_step for part in plan.stages[0].traffic}
    assert sent == {"dp": 2 * 7 / 8 * 8_030_261_248, "zero": 2 * 7 / 8 * 8_030_261_248}
    middle = published_plan(1, micro_batches=8).stages[3]
    hidden = 2 * 8192 * 8192
    norms = 2 * 2 * 10 * 2 * 8192 * 7 / 8  # two a layer, on every tp rank whole
    found = [(part.axis, part.bytes_per_step, part.count) for part in middle.traffic]
    assert found == [
        ("sp", 8 * 10 * 10 * 7 / 8 * hidden, 8 * 10 * 10),
        ("pp", 8 * 2 * hidden / 8, 8 * 4),
        ("sp", norms, 2 * 10),
    ]


def test_a_group_within_a_node_is_faster_than_one_across() -> None:
    assert NPU.bandwidth(list(range(8))) == pytest.approx(0.7 * 7 * 28e9)
    assert NPU.bandwidth([0, 8]) == pytest.approx(0.7 * 25e9)


def test_flops_and_bubble() -> None:
    plan = published_plan(1)
    weights = 70_553_706_496 - 128256 * 8192 - (2 * 80 + 1) * 8192
    assert plan.flops_per_token == pytest.approx(6 * weights + 12 * 80 * 64 * 128 * 8193 / 2)
    assert plan.bubble == pytest.approx(7 / 263)
    assert plan.mfu == pytest.approx(plan.tokens_per_s_device * plan.flops_per_token / NPU.flops_per_s)


@pytest.mark.parametrize("index", [0, 1])
def test_published_speeds_are_near_with_one_set_of_constants(index: int) -> None:
    found = compare(published_plan(index))
    assert found is not None
    assert 0.75 < found.ratio < 1.25


def test_pieces() -> None:
    for tokens in (1, 100, 128, 1000, 1024, 8192):
        assert query_key_pairs(tokens) == sum((stop - start) * stop for start, stop in query_blocks(tokens))
        for vocab, most in ((512, 512), (49152, 512), (128256, 256)):
            assert chunk_size(vocab, tokens) == min(most, tokens)


def test_memory_is_within_a_tenth_of_a_process() -> None:
    sizes = {"batch_size": 2, "micro_batches": 1, "recompute": "none"}
    none = {**SMALL, "vocab_size": 8, "dim": 8, "n_layers": 1, "n_heads": 2, "ffn_dim": 8}  # the process itself
    cases = [{"config": none, "seq_length": 8, **sizes}, {"config": SMALL, "seq_length": 256, **sizes}]
    command = [sys.executable, "-m", "llama31_core.training.rehearsal"]
    processes = [subprocess.Popen([*command, json.dumps(case)], stdout=subprocess.PIPE, text=True) for case in cases]
    itself, measured = [int(process.communicate()[0].split()[-1]) for process in processes]
    work = TrainWorkload(ModelConfig(**SMALL), ParallelConfig(), 256, 2, 1, "none")
    planned = plan_training(work, find_device("cpu")).largest.memory.total
    assert planned == pytest.approx(measured - itself, rel=0.1)


def test_prediction_memory_counted_by_hand() -> None:
    work = PredictWorkload(ModelConfig.preset("llama3.1-8b"), ParallelConfig(), 512, 16, 512, 512, 16)
    plan = plan_prediction(work, NPU)
    assert plan.stages[0].parts["kv cache"] == 2 * 2 * 32 * 8 * 128 * 16 * 512
    assert plan.cache_tokens == 8192
    assert plan.fits
    assert plan.decode[1] == pytest.approx(NPU.memory_bytes_per_s * 0.8 / (2 * 7.5e9 + 33e6), rel=0.01)


def test_copies_of_key_value_heads_cost_every_rank_one() -> None:
    config = ModelConfig.preset("llama3.1-8b")
    sizes = [
        plan_prediction(PredictWorkload(config, ParallelConfig(tp=tp), 512, 16, 512, 512, 16), NPU)
        .stages[0]
        .parts["kv cache"]
        for tp in (8, 16)
    ]
    assert sizes[0] == sizes[1]


def test_a_search_counts_every_layout_and_none_that_does_not_fit() -> None:
    work = published_plan(0).work
    result = search_layouts(work, NPU, 8)
    assert result.plans
    assert all(plan.fits and plan.work.parallel.world_size == 8 for plan in result.plans)
    assert all(plan.work.tokens_per_step == work.tokens_per_step for plan in result.plans)
    assert [plan.seconds for plan in result.plans] == sorted(plan.seconds for plan in result.plans)
    assert result.dropped["more memory than a device has"] > 0
    for plan in result.plans[:3]:
        assert plan.seconds == pytest.approx(plan_training(plan.work, NPU).seconds)
        assert plan.largest.memory == plan_training(plan.work, NPU).largest.memory


def test_a_search_without_a_result_says_what_came_closest() -> None:
    result = search_layouts(published_plan(1).work, NPU, 4)
    assert not result.plans
    assert result.closest is not None
    assert result.closest.largest.memory.total > NPU.usable_bytes


TRAINS = """
run_mode: finetune
lr_schedule: {learning_rate: 1.0e-5}
use_parallel: True
parallel_config: {data_parallel: 2, model_parallel: 2, pipeline_stage: 2, micro_batch_num: 4}
model:
  model_config: {seq_length: 256, hidden_size: 512, num_layers: 6, num_heads: 8, n_kv_heads: 2, intermediate_size: 1376,
    vocab_size: 4096}
"""


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(TRAINS)
    command = ["plan", "--config", str(tmp_path / "run.yaml"), "--search", "--json", str(tmp_path / "plan.json")]
    assert main([*command, "--picture", str(tmp_path / "plan.png"), "recompute_config.recompute=True"]) == 0
    printed = capsys.readouterr().out
    assert "8 devices" in printed
    assert "recomputed: full" in printed
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"]
    assert [stage["stage"] for stage in figures["stages"]] == [0, 1]
    assert figures["search"]["best"][0]["tokens_per_s_device"] >= figures["tokens_per_s_device"] * 0.99
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_of_single_ranks_is_drawn_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ranks are called 0, 1, …; matplotlib asks whether such names are meant as numbers."""
    (tmp_path / "run.yaml").write_text(TRAINS)
    mesh = ["parallel_config.data_parallel=1", "parallel_config.model_parallel=1"]
    with caplog.at_level(logging.INFO):
        command = ["plan", "--config", str(tmp_path / "run.yaml"), "--picture", str(tmp_path / "plan.png"), *mesh]
        assert main(command) == 0
    assert not caplog.records


def test_micro_batches_are_those_that_the_trainer_makes(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(TRAINS)
    for stages, accumulated, counted in ((2, 1, 4), (2, 3, 12), (1, 1, 1), (1, 3, 3)):
        values = [f"parallel_config.pipeline_stage={stages}"]
        values.append(f"runner_config.gradient_accumulation_steps={accumulated}")
        run = load_run_config(tmp_path / "run.yaml", values)
        assert TrainWorkload.of(run, "run.yaml").micro_batches == counted
        assert RunPlan.of(run, 100, "run.yaml").accumulated == counted


def test_the_architecture_may_be_that_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ModelConfig.preset("smollm2-135m").save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text("lr_schedule: {learning_rate: 1.0e-5}\nmodel: {model_config: {seq_length: 256}}")
    command = ["plan", "--config", str(tmp_path / "run.yaml"), "--device", "cpu"]
    assert main([*command, f"load_checkpoint={tmp_path / 'model'}"]) == 0
    assert "134,515,008 parameters" in capsys.readouterr().out
    assert main(command) == 1
    assert "they say what the model's architecture is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "ascend910x"], "did you mean 'ascend910"),
        (["--devices", "8"], "it is for --search"),
        (["--search", "--devices", "0"], "allowed is 1 or more"),
        (["parallel_config.pipeline_stage=5"], "run.yaml: micro_batch_num=4 is less than pp=5"),
        (
            ["parallel_config.micro_batch_num=5", "model.model_config.pp_interleave_num=2"],
            "micro_batch_num=5 is no multiple of pp=2",
        ),
        (
            ["parallel_config.context_parallel=2", "model.model_config.seq_length=258"],
            "run.yaml: seq_length=258 cannot be cut into 2 x cp = 4",
        ),
        (["parallel_config.use_seq_parallel=True", "model.model_config.seq_length=255"], "the 255 tokens that a rank"),
        (["parallel_config.model_parallel=3"], "tp=3 does not fit"),
    ],
)
def test_what_cannot_be_planned(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(TRAINS)
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), *arguments]) == 1
    assert said in capsys.readouterr().err
