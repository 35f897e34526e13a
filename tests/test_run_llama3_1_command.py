"""`run_llama3_1.py` and `run_llama3_predict.sh` as MindFormers' guide calls them, on a small model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from run_llama3_1 import build_parser, main, overrides, without_effect
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core.checkpoint import open_weights, parameter_shapes, save_weights, spell
from llama31_core.config import ModelConfig
from llama31_data.cli import main as data
from llama31_tokenizer import Tokenizer
from model_assets import fetch

TOOLS = Path(__file__).resolve().parents[1] / "tools"
CONFIGS = TOOLS.parent / "configs"
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 64,
         "vocab_size": 128256, "rms_norm_eps": 1e-5, "theta": 500000.0, "max_position_embedding": 512,
         "bos_token_id": 128000, "eos_token_id": [128001, 128009], "pad_token_id": 128004}  # fmt: skip
MAX_LENGTH = 24


def write_yaml(path: Path, **more: Any) -> Path:
    path.write_text(yaml.safe_dump(more))
    return path


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """predict_small.yaml, and small.ckpt beside it: an architecture with no config.json."""
    folder = tmp_path_factory.mktemp("small")
    section = SIZES | {"seq_length": 64, "max_decode_length": MAX_LENGTH, "do_sample": False}
    path = write_yaml(folder / "predict_small.yaml", run_mode="predict", model={"model_config": section})
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(architecture()).items()
    weights = ((name, rng.normal(float(len(shape) == 1), 0.2, shape).astype(np.float32)) for name, shape in shapes)
    save_weights(folder / "small.ckpt", weights)
    return path


def architecture() -> ModelConfig:
    return ModelConfig(vocab_size=128256, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=512)


def completed(checkpoint: Path, prompt: str, max_length: int, *, bos: bool = False) -> str:
    """The prompt and what transformers' model says after it."""
    with open_weights(checkpoint) as reader:
        weights = {spell(name, "hf"): torch.from_numpy(reader.read(name)) for name in reader.names()}
    model = LlamaForCausalLM(LlamaConfig(**architecture().to_hf())).eval()
    model.load_state_dict(weights)
    tokenizer = Tokenizer.from_file(fetch("llama3-tokenizer"))
    ids = torch.tensor([tokenizer.encode(prompt, bos=bos)])
    said = model.generate(ids, max_length=max_length, do_sample=False, eos_token_id=[128001, 128009])
    return prompt + tokenizer.decode(said[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(TOOLS / "run_llama3_predict.sh"), *arguments]
    values = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=values, capture_output=True, text=True, timeout=300, check=False)


def test_the_guide_s_script_completes_prompts(run_file: Path, tmp_path: Path) -> None:
    prompts = ["The weather in Paris", "Once"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    checkpoint = run_file.parent / "small.ckpt"
    vocabulary = str(fetch("llama3-tokenizer"))
    result = shell("single", str(run_file), str(checkpoint), vocabulary, PREDICT_DATA=str(tmp_path / "prompts.txt"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"{completed(checkpoint, prompt, MAX_LENGTH)}\n" for prompt in prompts)


@pytest.mark.slow
def test_the_guide_s_script_completes_prompts_over_two_ranks(run_file: Path, tmp_path: Path) -> None:
    checkpoint, sizes = run_file.parent / "small.ckpt", {"parallel_config": {"model_parallel": 2}}
    split = write_yaml(run_file.with_name("split.yaml"), **(yaml.safe_load(run_file.read_text()) | sizes))
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    arguments = ["parallel", str(split), str(checkpoint), str(fetch("llama3-tokenizer")), "2"]
    result = shell(*arguments, PREDICT_DATA="Once", MASTER_PORT=port, LOG_DIR=str(tmp_path / "log"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert completed(checkpoint, "Once", MAX_LENGTH) in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["single", "a.yaml", "b.ckpt"], 2, "run_llama3_predict.sh single   CONFIG_PATH CKPT_PATH VOCAB_FILE"),
        (["both", "a.yaml", "b.ckpt", "c"], 2, "run_llama3_predict.sh parallel CONFIG_PATH"),
        (["parallel", "a.yaml", "b.ckpt", "c"], 2, "VOCAB_FILE DEVICE_NUM"),
        (["single", "/nowhere.yaml", "b.ckpt", "c"], 1, "/nowhere.yaml does not exist"),
    ],
)
def test_the_script_says_what_is_wrong(arguments: list[str], code: int, message: str) -> None:
    result = shell(*arguments)
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr


def test_flags_come_before_the_file(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_file.parent / "small.ckpt"
    bos = write_yaml(run_file.with_name("bos.yaml"), add_bos_token=True, **yaml.safe_load(run_file.read_text()))
    flags = ["--load_checkpoint", str(checkpoint), "--vocab_file", str(fetch("llama3-tokenizer"))]
    old = ["--device_id", "0", "--mode", "0", "--resume", "False"]
    assert main(["--config", str(bos), *flags, *old, "--predict_data", "-- a text", "--max_length", "12"]) == 0
    printed = capsys.readouterr()
    assert printed.out == completed(checkpoint, "-- a text", 12, bos=True) + "\n"
    assert "--mode (one compiled graph computes); --resume (prediction trains nothing)" in printed.err


def test_finetune_is_the_finetune_command(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = files("llama31_data") / "sample" / "instructions.json"
    conversations, records = tmp_path / "conversations.json", tmp_path / "data" / "records.mindrecord"
    records.parent.mkdir()
    assert data(["convert", "--data_path", str(sample), "--output_path", str(conversations)]) == 0
    lengths = ["--dataset_type", "qa", "--seq_length", "64", "--model_file", str(fetch("llama3-tokenizer"))]
    assert data(["preprocess", *lengths, "--input_glob", str(conversations), "--output_file", str(records)]) == 0
    model_dir = tmp_path / "base"
    architecture().save_pretrained(model_dir)
    with open_weights(run_file.parent / "small.ckpt") as reader:
        save_weights(model_dir, ((name, reader.read(name)) for name in reader.names()))
    run = write_yaml(
        tmp_path / "finetune.yaml",
        run_mode="finetune",
        output_dir=str(tmp_path / "output"),
        runner_config={"max_steps": 1},
        lr_schedule={"learning_rate": 1e-3},
    )
    flags = ["--load_checkpoint", str(model_dir), "--train_data", str(records.parent), "--seq_length", "64"]
    capsys.readouterr()
    more = ["--auto_trans_ckpt", "True", "--use_parallel", "False", "--vocab_file", "x"]
    assert main(["--config", str(run), "--run_mode", "finetune", *flags, *more]) == 0
    printed = capsys.readouterr()
    assert "1 steps" in printed.out
    assert (tmp_path / "output" / "model" / "config.json").is_file()
    assert "1 flags have no effect here: --vocab_file (training data is token ids)" in printed.err


def test_every_flag_has_its_key_or_its_reason() -> None:
    parser = build_parser()
    flags = {
        "seq_length": "9", "use_parallel": "True", "device_id": "1", "mode": "1", "load_checkpoint": "a: b",
        "src_strategy": "s", "auto_trans_ckpt": "true", "resume": "True", "train_dataset": "d", "eval_dataset": "e",
        "predict_data": "p", "max_length": "7", "remote_save_url": "u", "vocab_file": "v", "dp": "2", "mp": "3",
        "pp": "4", "micro_batch_num": "5",
    }  # fmt: skip
    for mode in ("predict", "finetune"):
        arguments = parser.parse_args(["--config", "c", "--run_mode", mode])
        bare = (set(overrides(arguments)), set(without_effect(arguments)))
        assert bare == ({f'run_mode="{mode}"'}, set())
        for name, text in flags.items():
            arguments = parser.parse_args(["--config", "c", "--run_mode", mode, f"--{name}", text])
            told = set(overrides(arguments)) - bare[0] | set(without_effect(arguments))
            assert told or (mode, name) in {("predict", "predict_data"), ("predict", "max_length")}, name
    arguments = parser.parse_args(["--config", "c", "--load_checkpoint", "a: b"])
    assert 'load_checkpoint="a: b"' in overrides(arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predict_data", "x", "--modes", "1"], "unrecognized arguments: --modes"),
        (["--predict_data", "x", "--task", "translation"], "invalid choice: 'translation'"),
        (["--run_mode", "eval"], "invalid choice: 'eval'"),
        ([], "--run_mode predict completes prompts; give --predict_data"),
        (["--predict_data", "{empty}"], "holds no prompt"),
        (["--train_data", "a", "--train_dataset", "b"], "not allowed with argument"),
        (["--use_parallel", "maybe"], "'maybe' is neither True nor False"),
    ],
)
def test_wrong_usage(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    flags = [flag.format(empty=tmp_path / "empty.txt") for flag in flags]
    with pytest.raises(SystemExit) as end:
        main(["--config", str(CONFIGS / "predict_tiny.yaml"), *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
