"""`llama31-core predict` on several ranks says what one process says, token for token; and ends when a rank is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llama31_core.checkpoint import parameter_shapes, save_weights
from llama31_core.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "tools" / "msrun_launcher.sh"
RECORDS: list[dict[str, Any]] = [
    {"token_ids": list(range(1, 40)), "max_tokens": 12, "temperature": 0},
    {"token_ids": [7, 8, 9], "max_tokens": 9, "temperature": 0.9, "seed": 3, "top_p": 0.9, "logprobs": 2},
    {"token_ids": [7, 8, 9, 10], "max_tokens": 6, "temperature": 1.2, "seed": 11, "n": 2},
]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Random weights, four query heads over two key-value heads, and a vocabulary of bytes."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = ModelConfig.preset("tiny").model_copy(update={"max_seq_len": 128})
    config.save_pretrained(directory)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    save_weights(directory, ((n, rng.normal(float(len(s) == 1), 0.2, s).astype(np.float32)) for n, s in shapes))
    vocabulary = {f"<{token}>": token for token in range(config.vocab_size)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def write_run(path: Path, model_dir: Path, **mesh: Any) -> Path:
    section = {"seq_length": 96, "block_size": 8, "num_blocks": 32, "do_sample": False, "max_decode_length": 64}
    values: dict[str, Any] = {"run_mode": "predict", "load_checkpoint": str(model_dir)}
    values["model"] = {"model_config": section}
    if mesh:
        values |= {"use_parallel": True, "parallel_config": mesh}
    path.write_text(yaml.safe_dump(values))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LLAMA31_NATIVE_KERNELS": "0"}


def predict(tmp_path: Path, run_file: Path, name: str, records: Sequence[dict[str, Any]] = RECORDS) -> list[str]:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    program = [sys.executable, "-m", "llama31_core", "predict", "--raw", "--config", str(run_file)]
    return [*program, "--input", str(source), "--output", str(tmp_path / f"{name}.jsonl")]


def launched(program: list[str], ranks: int, log_dir: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return ["bash", str(LAUNCHER), " ".join(program), str(ranks), str(port), str(log_dir), "True", "60"]


def ids_of(tmp_path: Path, name: str) -> list[list[list[int]]]:
    results = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return [[completion["token_ids"] for completion in result["completions"]] for result in results]


def check_equal(tmp_path: Path, model_dir: Path, ranks: int, **mesh: Any) -> None:
    run = predict(tmp_path, write_run(tmp_path / "one.yaml", model_dir), "one")
    alone = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    run = predict(tmp_path, write_run(tmp_path / "several.yaml", model_dir, **mesh), "several")
    command = launched(run, ranks, tmp_path / "log")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = ids_of(tmp_path, "several")
    assert [len(ids) for record in found for ids in record] == [12, 9, 6, 6]
    assert found == ids_of(tmp_path, "one")


def test_two_ranks_say_what_one_process_says(tmp_path: Path, model_dir: Path) -> None:
    check_equal(tmp_path, model_dir, 2, model_parallel=2, vocab_emb_dp=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (4, {"model_parallel": 4}),  # two ranks hold copies of each key-value head
        (2, {"pipeline_stage": 2}),
        (4, {"model_parallel": 2, "pipeline_stage": 2, "vocab_emb_dp": False}),
    ],
)
def test_other_meshes_say_what_one_process_says(
    tmp_path: Path, model_dir: Path, ranks: int, mesh: dict[str, Any]
) -> None:
    check_equal(tmp_path, model_dir, ranks, **mesh)


@pytest.mark.slow
def test_all_end_when_a_rank_is_killed_in_the_middle(tmp_path: Path, model_dir: Path) -> None:
    records = [{"token_ids": [1, 2, 3], "max_tokens": 60, "temperature": 0} for _ in range(3000)]
    run = predict(tmp_path, write_run(tmp_path / "run.yaml", model_dir, model_parallel=2), "out", records)
    with subprocess.Popen(
        launched(run, 2, tmp_path / "log"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_for_results(tmp_path / ".out.jsonl.progress")
        os.kill(find_rank(1, run[-1]), signal.SIGKILL)
        started = time.monotonic()
        printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode != 0
    assert "rank 1" in printed
    assert not (tmp_path / "out.jsonl").exists()


def wait_for_results(spool: Path) -> None:
    deadline = time.monotonic() + 200
    while not spool.exists() or spool.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline, "no result came"
        time.sleep(0.2)


def find_rank(rank: int, marker: str) -> int:
    """The process of a rank, and not the one that watches it: by its command line and environment."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if marker.encode() in command and b"msrun_supervisor" not in command:
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"RANK_ID={rank}".encode() in variables and b"MS_ROLE=MS_WORKER" in variables:
                    return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} is not there")


def test_a_mesh_without_a_launcher_or_with_replicas_is_refused(tmp_path: Path, model_dir: Path) -> None:
    for mesh, said in (({"model_parallel": 2}, "no launcher started"), ({"data_parallel": 2}, "data_parallel is 2")):
        run = predict(tmp_path, write_run(tmp_path / "run.yaml", model_dir, **mesh), "out")
        variables = {name: value for name, value in environment().items() if name not in ("RANK_ID", "MS_WORKER_NUM")}
        done = subprocess.run(run, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert said in done.stderr
