"""The YAML of a fine-tuning run: MindFormers' keys, overrides, and one clear sentence for what is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.run_config import load_run_config
from llama31_core.training.schedule import plan_warmup

MINIMAL = "lr_schedule: {learning_rate: 1.e-5}\n"


@pytest.fixture
def write(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_values_have_their_types_and_overrides_win(write: Path) -> None:
    write.write_text(MINIMAL + "runner_config: {epochs: 2, batch_size: 4}\noptimizer: {beta1: 0.8, eps: 1e-8}\n")
    run = load_run_config(write, ["runner_config.epochs=5", "model.model_config.seq_length=64", "output_dir=out"])
    assert (run.runner_config.epochs, run.runner_config.batch_size) == (5, 4)
    assert run.model_section.seq_length == 64
    assert run.output_dir == "out"
    assert run.lr_schedule.learning_rate == 1e-5
    assert run.optimizer.moments == (0.8, 0.95)
    assert run.optimizer.eps == 1e-8  # YAML 1.1 takes 1e-8 for a string


def test_keys_without_a_meaning_here_are_named_in_one_warning(write: Path, caplog: pytest.LogCaptureFixture) -> None:
    write.write_text(
        MINIMAL
        + "runner_config: {sink_mode: True}\ntrainer: {type: CausalLanguageModelingTrainer, model_name: x}\n"
        + "model: {model_config: {type: LlamaConfig, use_past: False}, arch: {type: LlamaForCausalLM}}\n"
    )
    with caplog.at_level(logging.WARNING):
        load_run_config(write)
    [record] = caplog.records
    for key in ("runner_config.sink_mode", "trainer", "model.model_config.type", "model.arch"):
        assert key in record.getMessage()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "runner_confg: {}", r"unknown key 'runner_confg'; did you mean 'runner_config'"),
        (MINIMAL + "runner_config: {epoch: 1}", r"unknown key 'runner_config.epoch'; did you mean 'epochs'"),
        (MINIMAL + "model: {model_config: {seq_len: 1}}", r"'model.model_config.seq_len'; did you mean 'seq_length'"),
        (MINIMAL + "runner_config: {epochs: two}", "runner_config.epochs.*'two'"),
        (MINIMAL + "runner_config: {batch_size: 0}", "runner_config.batch_size"),
        (MINIMAL + "optimizer: {type: Lion}", r"optimizer\.type.*'Lion'"),
        ("lr_schedule: {learning_rate: -1}", "lr_schedule.learning_rate"),
        ("run_mode: finetune", "lr_schedule"),
        ("- 1", "holds list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_are_named_by_file_and_key(text: str, message: str, write: Path) -> None:
    write.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_run_config(write)
    assert str(write) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [("epochs", "section.key=value"), ("seed.x=1", "'seed' is a value"), ("seed=[", "not YAML"), ("sed=1", "'seed'")],
)
def test_bad_overrides_are_named(override: str, message: str, write: Path) -> None:
    write.write_text("seed: 1\n" + MINIMAL)
    with pytest.raises(ConfigError, match=message):
        load_run_config(write, [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_run_config(tmp_path / "none.yaml")


def test_architecture_keys_must_fit_the_checkpoint(write: Path) -> None:
    write.write_text(MINIMAL + "model: {model_config: {num_layers: 2, hidden_size: 128, seq_length: 32}}")
    with pytest.raises(ConfigError, match=r"hidden_size is 128, the checkpoint's is 64"):
        load_run_config(write).model_section.check_against(ModelConfig.preset("tiny"), "run.yaml")


def test_a_sequence_beyond_the_context_is_refused(write: Path) -> None:
    write.write_text(MINIMAL + "model: {model_config: {seq_length: 513}}")
    with pytest.raises(ConfigError, match="513, beyond the model's context of 512"):
        load_run_config(write).model_section.check_against(ModelConfig.preset("tiny"), "run.yaml")


def test_warmup_is_given_once_and_ends_within_the_run() -> None:
    assert plan_warmup(None, 0.1, 50) == 5
    assert plan_warmup(7, None, 50) == 7
    assert plan_warmup(None, None, 50) == 0
    with pytest.raises(ConfigError, match="both"):
        plan_warmup(1, 0.1, 50)
    with pytest.raises(ConfigError, match="more than the 50 steps"):
        plan_warmup(51, None, 50)
