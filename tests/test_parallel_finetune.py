"""`llama31-core finetune` on several ranks: as one process does it; and starts that cannot be."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from mindspore.mindrecord import FileWriter

from llama31_core.checkpoint import open_weights, parameter_shapes, save_weights
from llama31_core.config import ModelConfig

LAUNCHER = Path(__file__).resolve().parents[1] / "tools" / "msrun_launcher.sh"
STEPS = 3


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Three steps of two micro-batches of two sequences."""
    config = ModelConfig.preset("tiny")
    (tmp_path / "source").mkdir()
    config.save_pretrained(tmp_path / "source")
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    values = ((n, rng.normal(float(len(s) == 1), 0.05, s).astype(np.float32)) for n, s in shapes)
    save_weights(tmp_path / "source", values)
    writer = FileWriter(str(tmp_path / "train.mindrecord"))
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")})
    for _ in range(24):
        row = rng.integers(0, config.vocab_size, 17).astype(np.int32)
        writer.write_raw_data([{"input_ids": row, "labels": row}])
    writer.commit()
    run = {
        "load_checkpoint": str(tmp_path / "source"),
        "auto_trans_ckpt": True,
        "runner_config": {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS},
        "lr_schedule": {"learning_rate": 1e-2},
        # Above the rounding errors of gradients, whose sign alone would else decide on some weights' steps.
        "optimizer": {"eps": 1e-5},
        "train_dataset": {"data_loader": {"dataset_dir": str(tmp_path / "train.mindrecord"), "shuffle": False}},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_checkpoint_max": 1}],
        "model": {"model_config": {"seq_length": 16}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def launch(run_file: Path, ranks: int, log_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Ranks under the launcher, until they end."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    program = " ".join([sys.executable, "-m", "llama31_core", "finetune", str(run_file), *overrides])
    command = ["bash", str(LAUNCHER), program, str(ranks), str(port), str(log_dir), "True", "60"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r", loss: ([0-9.]+)", printed)]


def test_ranks_train_as_one_process_does(run_file: Path, tmp_path: Path) -> None:
    one = [sys.executable, "-m", "llama31_core", "finetune", str(run_file), f"output_dir={tmp_path / 'one'}"]
    alone = subprocess.run(one, env=environment(), capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    sizes = ["model_parallel=2", "vocab_emb_dp=False", "use_seq_parallel=True"]
    overrides = [f"output_dir={tmp_path / 'ranks'}", "use_parallel=True", *(f"parallel_config.{s}" for s in sizes)]
    done = launch(run_file, 2, tmp_path / "log", *overrides)
    log = (tmp_path / "log" / "worker_0.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert losses(log) == losses(alone.stdout)
    assert len(losses(log)) == STEPS
    assert not losses((tmp_path / "log" / "worker_1.log").read_text())
    for part in ("model", "checkpoints/step_00000002"):
        with open_weights(tmp_path / "one" / part) as a, open_weights(tmp_path / "ranks" / part) as b:
            for name in a.names():
                np.testing.assert_allclose(a.read(name), b.read(name), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(run_file: Path, tmp_path: Path) -> None:
    output = f"output_dir={tmp_path / 'out'}"
    data = ["parallel_config.data_parallel=2", "runner_config.batch_size=1"]
    stopped = launch(run_file, 2, tmp_path / "first", output, "use_parallel=True", *data, "runner_config.max_steps=2")
    assert stopped.returncode == 0, stopped.stdout
    for path in (tmp_path / "out" / "model").iterdir():
        path.unlink()
    (tmp_path / "out" / "model").rmdir()
    stages = ["parallel_config.pipeline_stage=2", "parallel_config.micro_batch_num=2"]
    steps = ["runner_config.gradient_accumulation_steps=1", "resume_training=True"]
    done = launch(run_file, 2, tmp_path / "second", output, "use_parallel=True", *stages, *steps)
    log = (tmp_path / "second" / "worker_0.log").read_text()
    assert done.returncode == 0, log
    assert "resumed after step 2" in log
    assert len(losses(log)) == STEPS - 2


@pytest.mark.slow
def test_a_rank_that_never_comes_is_told(run_file: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    mesh = ["use_parallel=True", "parallel_config.data_parallel=2", f"output_dir={tmp_path / 'out'}"]
    program = " ".join([sys.executable, "-m", "llama31_core", "finetune", str(run_file), *mesh])
    arguments = [program, "2", "1", "127.0.0.1", str(port), "0", str(tmp_path / "log"), "True", "15"]
    command = ["bash", str(LAUNCHER), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode != 0
    log = (tmp_path / "log" / "worker_0.log").read_text()
    assert f"the ranks did not meet at 127.0.0.1:{port}" in log
    assert "of 2 ranks these never came: 1\n" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differs", "what"),
    [
        ("seed=$RANK_ID", "the configuration"),
        ("load_checkpoint={}/source$RANK_ID", "the checkpoint of load_checkpoint"),
    ],
)
def test_ranks_that_differ_end_with_one_message(differs: str, what: str, run_file: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copytree(tmp_path / "source", tmp_path / f"source{rank}")
    weights = tmp_path / "source1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3e")  # the last number, a little larger or smaller
    other = tmp_path / "per_rank.sh"
    command = f"{sys.executable} -m llama31_core finetune {run_file} use_parallel=True parallel_config.data_parallel=2"
    other.write_text(f"exec {command} output_dir={tmp_path}/out {differs.format(tmp_path)}\n")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    arguments = [f"bash {other}", "2", str(port), str(tmp_path / "log"), "True", "60"]
    done = subprocess.run(
        ["bash", str(LAUNCHER), *arguments], env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode != 0
    first, second = ((tmp_path / "log" / f"worker_{rank}.log").read_text() for rank in (0, 1))
    assert f"ranks do not agree on {what}" in first
    assert "ranks do not agree" not in second
    assert not (tmp_path / "out").exists()


def test_a_mesh_needs_a_launcher(run_file: Path) -> None:
    mesh = ["use_parallel=True", "parallel_config.data_parallel=2"]
    own = {name: value for name, value in environment().items() if name not in ("MS_WORKER_NUM", "RANK_ID")}
    command = [sys.executable, "-m", "llama31_core", "finetune", str(run_file), *mesh]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no launcher started this one" in done.stderr


@pytest.mark.parametrize("rank", ["0", "3"])
def test_another_number_of_ranks_is_told_with_what_would_fit(run_file: Path, rank: str) -> None:
    """By each rank for itself: they have not met."""
    command = [sys.executable, "-m", "llama31_core", "finetune", str(run_file), "use_parallel=True"]
    sizes = ["parallel_config.data_parallel=2", "parallel_config.model_parallel=2"]
    own = environment() | {"MS_WORKER_NUM": "8", "RANK_ID": rank}
    done = subprocess.run([*command, *sizes], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "8 were started; with the other sizes as they are, data_parallel=4 would fit" in done.stderr
