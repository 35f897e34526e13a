"""The commands as people type them, and the guide's scripts under their old names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama31_data.cli import main
from llama31_data.sample import SAMPLE_PATH

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def preprocess(lab: Any, *more: str, output: Path | None = None) -> int:
    options = lab.options()
    return main(
        [
            *("preprocess", "--input_glob", *options.input_glob, "--model_file", options.model_file),
            *("--seq_length", "256", "--output_file", str(output or lab.output), *more),
        ]
    )


def test_preprocess_says_what_it_read_wrote_and_lost(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = lab.jsonl([{"instruction": "a", "output": "word " * 300}, {"instruction": "a"}])
    assert preprocess(lab, "--input_glob", str(SAMPLE_PATH), path, "--packing") == 0
    out = capsys.readouterr().out
    assert out.startswith("42 records read, 41 samples, ")
    assert "1 records rejected, 1 samples truncated, " in out
    assert f"rejects: {lab.output}.rejects.jsonl" in out
    assert f"manifest: {lab.output}.manifest.json" in out


def test_errors_are_one_line_and_exit_one(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess(lab, "--seq_length", "0") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "llama31-data: error: --seq_length is 0, allowed are 1 to 1048576\n"
    with pytest.raises(SystemExit) as caught:
        main(["preprocess"])
    assert caught.value.code == 2


def test_an_interrupt_says_how_to_go_on(lab: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from llama31_data import pipeline

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_rejects", interrupt)
    assert preprocess(lab) == 1
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err


def test_inspect_shows_the_trained_part(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(lab)
    capsys.readouterr()
    assert main(["inspect", str(lab.output), "--n", "1", "--start", "2"]) == 0
    assert capsys.readouterr().out == (
        "record 2 · 60 tokens · 17 trained on · 197 padding\n"
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBelow is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nHow many minutes are there "
        "in a week?\n\n### Response:<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "[[10080 minutes: 7 days of 24 hours of 60 minutes.<|eot_id|>]]\n\n"
    )
    assert main(["inspect", str(lab.output), "--n", "1", "--start", "2", "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[30;42m10080 minutes: 7 days of 24 hours of 60 minutes.<|eot_id|>\x1b[0m" in coloured


def test_inspect_takes_packed_records_apart_and_defuses_control_characters(
    lab: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lab.jsonl([{"instruction": "\x1b[31mred\r", "output": "one"}, {"instruction": "b", "output": "two"}])
    preprocess(lab, "--input_glob", path, "--packing")
    capsys.readouterr()
    assert main(["inspect", str(lab.output)]) == 0
    out = capsys.readouterr().out
    assert "record 0 · 2 samples" in out
    assert "--- sample 2 of 2" in out
    assert "[[one<|eot_id|>]]" in out
    assert "[[two<|eot_id|>]]" in out
    assert "\\x1b[31mred\\r" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "40"], "has records 0 to 39"),
        (["--model_file", str(SAMPLE_PATH)], "--model_file"),
    ],
)
def test_inspect_errors(lab: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    preprocess(lab)
    assert main(["inspect", str(lab.output), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_stats_count_what_the_manifest_counts(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for layout in ([], ["--packing"], ["--padding", "bucket", "--buckets", "64", "256"]):
        preprocess(lab, "--overwrite", *layout)
        assert main(["stats", str(lab.output)]) == 0
        stats = json.loads(Path(f"{lab.output}.stats.json").read_text())
        assert sum(stats["sample_tokens"]["histogram"]["counts"]) == stats["counts"]["samples"] == 40
        assert stats["sample_tokens"]["mean"] == pytest.approx(stats["counts"]["tokens"] / 40, abs=0.01)
        assert stats["sample_label_tokens"]["mean"] == pytest.approx(stats["counts"]["label_tokens"] / 40, abs=0.01)
        found[stats["layout"]] = stats["sample_tokens"]
    assert found["padded"] == found["packed"] == found["buckets"]
    assert "tokens a sample" in capsys.readouterr().out


def test_stats_draw_a_png(lab: Any) -> None:
    pytest.importorskip("matplotlib")
    preprocess(lab)
    assert main(["stats", str(lab.output), "--png", str(lab.path / "a.png")]) == 0
    assert (lab.path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not (TOOLS / "llama_preprocess.py").is_file(), reason="the scripts are in the repository only")
def test_the_old_scripts_do_what_the_commands_do(lab: Any) -> None:
    """The guide's two commands, flag for flag."""
    old = lab.path / "old"
    old.mkdir()
    run = [sys.executable, str(TOOLS / "alpaca_converter.py")]
    subprocess.run([*run, "--data_path", SAMPLE_PATH, "--output_path", old / "conversation.json"], check=True)
    script = [
        *(sys.executable, str(TOOLS / "llama_preprocess.py"), "--dataset_type", "qa"),
        *("--input_glob", str(old / "conversation.json"), "--model_file", lab.options().model_file),
        *("--seq_length", "256", "--output_file", str(old / "data.mindrecord")),
    ]
    subprocess.run(script, check=True)
    assert main(["convert", "--data_path", str(SAMPLE_PATH), "--output_path", str(lab.path / "conversation.json")]) == 0
    assert preprocess(lab, "--input_glob", str(lab.path / "conversation.json")) == 0
    assert lab.output.read_bytes() == (old / "data.mindrecord").read_bytes()
