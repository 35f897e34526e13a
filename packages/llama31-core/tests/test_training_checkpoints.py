"""Checkpoints of a run: resumed exactly, whole after any kill, and never lost to a full disk."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.checkpoint import open_weights, save_weights
from llama31_core.cli import main
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError
from llama31_core.training import checkpoints
from llama31_core.training.checkpoints import Checkpoints, ModelFiles, TrainerState, load_checkpoint

STEPS = 6
CONFIG = ModelConfig.preset("tiny")


def finetune(run_file: Path, output: Path, *changes: str) -> int:
    return main(["finetune", str(run_file), f"output_dir={output}", *changes])


def losses(text: str) -> dict[int, str]:
    """Step -> what its line says of loss, rate and norm."""
    return {int(n): rest for n, rest in re.findall(r"step: \[(\d+)/\d+\], (loss.*global_norm: [\d.]+)", text)}


def weights(directory: Path) -> dict[str, npt.NDArray[np.generic]]:
    with open_weights(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


def assert_same_weights(first: Path, second: Path) -> None:
    for name, value in weights(first).items():
        np.testing.assert_array_equal(value, weights(second)[name], err_msg=name)


def test_a_resumed_run_is_bit_identical_to_one_that_was_not_stopped(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With checkpoints that are written while training goes on; test_training_evaluation has the others."""
    change = "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 1, async_save: True}]"
    assert finetune(run_file, tmp_path / "whole", change) == 0
    whole = losses(capsys.readouterr().out)
    assert len(whole) == STEPS
    found = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert found == ["step_00000005", "step_00000006"]  # the newest two

    # As if it had been killed in step 6: the schedule and the data are those of the whole run.
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    os.rename(tmp_path / "whole" / "checkpoints" / "step_00000005", cut / "checkpoints" / "step_00000005")
    (cut / "checkpoints" / ".step_00000006.part").mkdir()
    assert finetune(run_file, cut) == 1
    assert "set resume_training=True" in capsys.readouterr().err
    assert finetune(run_file, cut, "seed=4", "resume_training=True") == 1
    assert "was made with seed 3, the run has 4" in capsys.readouterr().err
    assert finetune(run_file, cut, "resume_training=True") == 0
    assert losses(capsys.readouterr().out) == {6: whole[6]}
    assert_same_weights(tmp_path / "whole" / "model", cut / "model")
    assert not list((cut / "checkpoints").glob(".step*"))


COMMAND = [sys.executable, "-m", "llama31_core", "finetune"]


def start(run_file: Path, output: Path, *changes: str) -> subprocess.Popen[str]:
    arguments = [str(run_file), f"output_dir={output}", "resume_training=True", *changes]
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_sigterm_writes_a_checkpoint_and_ends_well(run_file: Path, tmp_path: Path) -> None:
    process = start(run_file, tmp_path / "out", "runner_config.max_steps=40", "runner_config.epochs=99")
    assert process.stdout is not None
    lines = iter(process.stdout)
    next(line for line in lines if "step: [3/" in line)
    process.send_signal(signal.SIGTERM)
    rest = "".join(lines)
    assert process.wait(60) == 0, rest
    [newest] = re.findall(r"stopped by SIGTERM; (\S+) is where", rest)
    state = json.loads((Path(newest) / "trainer_state.json").read_text())
    assert f"step_{state['step']:08d}" == Path(newest).name
    assert 3 <= state["step"] < 40


def kills(run_file: Path, tmp_path: Path, count: int) -> Iterator[tuple[int, int]]:
    """(steps that were reported, steps of the newest checkpoint) after each kill at a random moment."""
    rng, output = random.Random(5), tmp_path / "killed"
    every = "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 1}]"
    long = ("runner_config.max_steps=100000", "runner_config.epochs=99999")
    reached = 0
    for _ in range(count):
        process = start(run_file, output, every, *long)
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"step: \[(\d+)/", line):
                reached = int(match[1])
                break
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        reached = max([reached, *losses(process.stdout.read())])
        found = sorted((output / "checkpoints").glob("step_*"))
        for path in found:
            manifest = json.loads((path / "manifest.json").read_text())
            for name, entry in manifest["files"].items():
                assert (path / name).stat().st_size == entry["size_bytes"], f"{path / name} is not whole"
            assert all(np.isfinite(value).all() for value in weights(path).values())
        yield reached, int(found[-1].name.removeprefix("step_")) if found else 0


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_at_most_the_step_since_the_last_checkpoint(
    count: int, run_file: Path, tmp_path: Path
) -> None:
    before = 0
    for reached, saved in kills(run_file, tmp_path, count):
        assert reached - 1 <= saved <= reached + 1
        assert saved >= before
        before = saved
    assert before > 0


# What is done to files while a checkpoint is written and the one before it removed, as Python's audit hooks call it.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def ends_before_operation(number: int, save: Callable[[], None]) -> bool:
    """Let a child do something, and kill it at its operation `number` on files; whether it had ended before."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return not os.WIFSIGNALED(status)
    count = itertools.count()

    def kill(event: str, arguments: object) -> None:
        if event in OPERATIONS and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(kill)
        save()
        os._exit(0)
    finally:
        os._exit(1)


def test_a_kill_at_any_operation_on_files_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Kills one after the other at every point of a save: the newest checkpoint is the one before, or the new one."""
    values = {n: ({"w": np.full(8, n, np.float32)}, {"adam_mean.w": np.full(8, n + 0.5, np.float32)}) for n in (1, 2)}

    def save(directory: Path, step: int) -> None:
        kept = Checkpoints(directory, ModelFiles(tmp_path, CONFIG), keep=1, is_async=False)
        kept.save(*values[step], TrainerState(step, step, 1.0, 0, {}))

    found: list[int] = []
    has_ended = False
    while not has_ended:
        directory = tmp_path / str(len(found))
        save(directory, 1)
        has_ended = ends_before_operation(len(found), partial(save, directory, 2))
        kept = Checkpoints(directory, ModelFiles(tmp_path, CONFIG), keep=1, is_async=False)
        newest = kept.newest()
        assert newest is not None
        moments, state = load_checkpoint(newest, {"adam_mean.w": (8,)})
        assert newest.name == f"step_{state.step:08d}"
        np.testing.assert_array_equal(moments["adam_mean.w"], values[state.step][1]["adam_mean.w"])
        np.testing.assert_array_equal(weights(newest)["w"], values[state.step][0]["w"])
        assert json.loads((newest / "manifest.json").read_text())["files"].keys() >= {"model.safetensors"}
        kept.clean()
        assert not list(directory.glob(".*"))
        found.append(state.step)
    assert found == sorted(found)  # once it is there it stays
    assert set(found) == {1, 2}
    assert len(found) > 50


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path,
    random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = random_weights(CONFIG)
    saved = Checkpoints(tmp_path, ModelFiles(tmp_path, CONFIG), keep=1, is_async=False)
    state = TrainerState(1, 1, 1.0, 0, {})
    saved.save(values, {"adam_mean.x": np.zeros(2, np.float32)}, state)
    good = saved.newest()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        saved.save(values, {}, TrainerState(2, 2, 1.0, 0, {}))
    assert list(tmp_path.iterdir()) == [good]


def test_weights_that_are_no_numbers_are_refused_before_the_first_step(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "source"
    values = {name: value.copy() for name, value in weights(model).items()}
    values["model.norm_out.weight"][3] = np.nan
    save_weights(model / "model.safetensors", values.items(), overwrite=True)
    assert finetune(run_file, tmp_path / "out") == 1
    assert "model.norm_out.weight holds values that are no numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
