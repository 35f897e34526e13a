"""predict and chat by a run file: what it says counts, flags come before it, and what does not fit is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama31_core.cli import main
from llama31_core.config import ModelConfig
from llama31_core.inference.sum_runner import SumRunner

BOS = 256


def write_run(path: Path, load_checkpoint: Path | str = "", **more: Any) -> Path:
    """A run file; `model_config` and `tokenizer` stand for those sections."""
    section = {"seq_length": 96, "block_size": 8, "num_blocks": 24, "do_sample": False, "max_decode_length": 24}
    values: dict[str, Any] = {"run_mode": "predict", "load_checkpoint": str(load_checkpoint)}
    values["model"] = {"model_config": section | more.pop("model_config", {})}
    values["processor"] = {"tokenizer": more.pop("tokenizer", {})}
    path.write_text(yaml.safe_dump(values | more))
    return path


def said(prompt: list[int], count: int) -> str:
    """What SumRunner says after these ids."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(SumRunner(258).next_token(ids))
    return bytes(token for token in ids[len(prompt) :] if token < 256).decode(errors="replace")


def test_sizes_sampling_and_bos_are_those_of_the_file(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run.yaml", model_dir, add_bos_token=True)
    assert main(["predict", "--config", str(run), "--raw", "--echo", "--prompt", "hello", "--prompt", "abc"]) == 0
    # 24 tokens are prompt and answer, as max_decode_length counts them.
    first, second = said([BOS, *b"hello"], 18), said([BOS, *b"abc"], 20)
    assert capsys.readouterr().out == f"hello{first}\nabc{second}\n"
    assert [(runner.num_blocks, runner.block_size) for runner in runners] == [(24, 8)]


def test_flags_come_before_the_file(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run.yaml", "/nowhere")
    command = ["predict", str(model_dir), "--config", str(run), "--prompt", "hello"]
    flags = ["--max_tokens", "30", "--num_blocks", "9", "--set", "model.model_config.seq_length=64"]
    assert main([*command, "--raw", *flags]) == 0
    assert capsys.readouterr().out == said(list(b"hello"), 30) + "\n"
    assert main([*command, "--cache_memory_bytes", "100000"]) == 0
    assert [runner.num_blocks for runner in runners] == [9, 100000 // (2 * 4 * 8 * 8)]


def test_records_of_a_file_keep_to_its_length(model_dir: Path, runners: list[SumRunner], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.yaml", model_dir)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"token_ids": [5, 6]}\n{"token_ids": [7], "max_tokens": 3}\n{"token_ids": [8], "max_tokens": 30}\n'
    )
    assert main(["predict", "--config", str(run), "--input", str(source), "--output", str(output)]) == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(result["completions"][0]["token_ids"]) for result in results] == [22, 3]
    assert "exceed the 24 tokens" in Path(f"{output}.rejects.jsonl").read_text()


def test_a_file_that_samples_repeats_itself(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"do_sample": True, "top_k": 0}
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = write_run(tmp_path / f"{name}.yaml", model_dir, model_config=sampling, seed=seed)
        assert main(["predict", "--config", str(run), "--temperature", "90", "--prompt", "hello", "--raw"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_weights_without_a_configuration_take_the_file_s(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "elsewhere" / "weights.ckpt"
    weights.parent.mkdir()
    shutil.copy(model_dir / "model.safetensors", weights)  # told apart by content
    sizes = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "n_kv_heads": 1,
        "vocab_size": 258,
        "intermediate_size": 16,
    }
    vocabulary = {"vocab_file": str(model_dir / "tokenizer.json")}
    run = write_run(tmp_path / "run.yaml", weights, model_config=sizes, tokenizer=vocabulary)
    assert main(["predict", "--config", str(run), "--prompt", "hello", "--raw"]) == 0
    assert capsys.readouterr().out == said(list(b"hello"), 19) + "\n"


def test_a_weight_file_of_a_model_directory(
    model_dir: Path, runners: list[SumRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(model_dir / "model.safetensors")
    assert main(["predict", weights, "--prompt", "hello", "--raw", "--max_tokens", "9"]) == 0
    assert capsys.readouterr().out == said(list(b"hello"), 9) + "\n"


def test_a_chat_by_a_run_file(
    model_dir: Path,
    runners: list[SumRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path / "run.yaml", model_dir)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/set\n"))
    assert main(["chat", "--config", str(run), "--max_tokens", "7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(said(list(b"[user:hello]"), 7))
    assert "temperature=0.0" in printed
    assert runners[0].num_blocks == 24


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"load_checkpoint": ""}, "load_checkpoint is empty; name a model directory or a weight file"),
        ({"load_checkpoint": "/nowhere"}, "load_checkpoint is '/nowhere', and that does not exist"),
        ({"tokenizer": {"vocab_file": "/nowhere"}}, "processor.tokenizer.vocab_file is '/nowhere', and that does not"),
        ({"model_config": {"hidden_size": 32}}, "hidden_size is 32, the checkpoint's is 16; remove the key"),
        (
            {"model_config": {"seq_length": 513, "num_blocks": 99}},
            "seq_length is 513, beyond the model's context of 512",
        ),
        ({"use_parallel": True, "parallel_config": {"data_parallel": 2}}, "data_parallel is 2, prediction runs over"),
        ({"use_parallel": True, "parallel_config": {"model_parallel": 3}}, "tp=3 does not fit n_heads=2"),
        ({"run_mode": "finetune"}, "run_mode: Input should be 'predict'"),
        ({"model_config": {"num_blocks": 3}}, "hold fewer than seq_length=96; raise num_blocks"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: dict[str, Any],
    message: str,
    model_dir: Path,
    runners: list[SumRunner],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path / "run.yaml", **{"load_checkpoint": model_dir, **more})
    assert main(["predict", "--config", str(run), "--prompt", "hello"]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert str(run) in errors
    assert runners == []


def test_weights_without_any_architecture_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.ckpt").touch()
    run = write_run(tmp_path / "run.yaml", tmp_path / "weights.ckpt")
    assert main(["predict", "--config", str(run), "--prompt", "hello"]) == 1
    assert "there is no config.json in" in (errors := capsys.readouterr().err)
    assert "missing hidden_size" in errors


def test_a_prompt_that_leaves_no_room(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run.yaml", model_dir)
    assert main(["predict", "--config", str(run), "--raw", "--prompt", "x" * 24]) == 1
    assert "24 tokens leaves no room in the 24 tokens of a request; shorten the prompt or raise max_seq_len" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "no model is named; give MODEL_DIR, or --config"), (["{model}", "--set", "seed=1"], "give --config too")],
)
def test_flags_that_need_others(
    flags: list[str], message: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *(flag.format(model=model_dir) for flag in flags), "--prompt", "hello"]) == 1
    assert message in capsys.readouterr().err


def test_the_fixture_s_architecture_is_what_the_tests_assume(model_dir: Path) -> None:
    config = ModelConfig.from_pretrained(model_dir)
    assert (config.vocab_size, config.dim, config.max_seq_len) == (258, 16, 512)
