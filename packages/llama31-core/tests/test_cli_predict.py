"""predict and chat with an engine whose answers can be worked out by hand, and a tokenizer whose ids are bytes."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama31_core.cli import main
from llama31_core.commands.batch import REJECTS_SUFFIX
from llama31_core.commands.sampling_options import OPTIONS, add_sampling_options, given_options
from llama31_core.commands.spool import Spool, spool_path
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.sum_runner import SumRunner
from llama31_core.training.checkpoints import AdapterFiles
from llama31_core.training.lora import Lora

VOCAB = 258


def continued(ids: list[int], count: int) -> list[int]:
    """What SumRunner says after these ids."""
    said = list(ids)
    for _ in range(count):
        said.append(SumRunner(VOCAB).next_token(said))
    return said[len(ids) :]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sampling_parameter_has_a_flag_and_its_default() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names - {"logits_mask"} == set(OPTIONS)  # a mask is a function
    parser = argparse.ArgumentParser()
    add_sampling_options(parser, {})
    assert given_options(parser.parse_args([]), {}) == {}
    ids = ["--logit_bias", "3=1.5,4=-2", "--bad_words_ids", "1,2;3", "--stop_token_ids", "5,6", "--ignore_eos"]
    more = ["--max_tokens", "none", "--seed", "7", "--early_stopping", "never", "--temperature", "0"]
    given = parser.parse_args([*ids, *more])
    assert SamplingParams(**given_options(given, {})) == SamplingParams(
        max_tokens=None,
        logit_bias={3: 1.5, 4: -2.0},
        bad_words_ids=((1, 2), (3,)),
        stop_token_ids=(5, 6),
        ignore_eos=True,
        seed=7,
        early_stopping="never",
        temperature=0,
    )


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        (["--raw"], list(b"hello")),
        (["--raw", "--add_bos_token"], [256, *b"hello"]),
        ([], list(b"[user:hello]")),
        (["--system", "be brief"], list(b"[system:be brief][user:hello]")),
    ],
)
def test_a_prompt_is_completed(
    flags: list[str], prompt: list[int], model_dir: Path, runners: list[SumRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(model_dir), "--prompt", "hello", "--max_tokens", "9", *flags]) == 0
    output = capsys.readouterr()
    assert output.out == bytes(t for t in continued(prompt, 9) if t < 256).decode(errors="replace") + "\n"
    assert f"{len(prompt)} prompt tokens, 9 generated" in output.err


def test_a_file_of_records(model_dir: Path, runners: list[SumRunner], tmp_path: Path) -> None:
    lines = [
        {"id": "a", "prompt": "one"},
        "no json",
        {"messages": [{"role": "user", "content": "two"}], "max_tokens": 3, "logprobs": 1},
        "",
        {"id": 9, "token_ids": [7, 8, 9], "n": 2, "temperature": 1, "seed": 1},
        {"prompt": "x", "token_ids": [1]},
        {"prompt": "x", "top_q": 1},
        {"token_ids": [VOCAB]},
        {"prompt": "x" * 600},
        {"prompt": "x", "top_p": 7},
        {"prompt": "x", "adapter": "none such"},
    ]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    flags = ["--input", str(source), "--output", str(output), "--raw", "--max_tokens", "5"]
    assert main(["predict", str(model_dir), *flags]) == 0
    first, second, third = read_lines(output)
    assert (first["id"], second["id"], third["id"]) == ("a", 3, 9)
    assert first["completions"][0]["token_ids"] == continued(list(b"one"), 5)
    assert second["completions"][0]["token_ids"] == continued(list(b"[user:two]"), 3)
    assert [entry["token_id"] for entry in second["completions"][0]["logprobs"]] == continued(list(b"[user:two]"), 3)
    assert len(third["completions"]) == 2
    rejects = {entry["line"]: entry["error"] for entry in read_lines(Path(f"{output}{REJECTS_SUFFIX}"))}
    said = {2: "not JSON", 6: "got prompt and token_ids", 7: "did you mean", 8: "outside the vocabulary",
            9: "exceed the 512 tokens", 10: "top_p is 7", 11: "'none such' is not loaded"}  # fmt: skip
    assert {line: text in rejects[line] for line, text in said.items()} == dict.fromkeys(rejects, True)
    assert not spool_path(output).exists()


def test_an_interrupted_run_goes_on_where_it_was(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"record {n}", "max_tokens": 2 + n} for n in range(12)])
    flags = ["--input", str(source), "--max_batch_size", "2", "--raw"]
    assert main(["predict", str(model_dir), *flags, "--output", str(tmp_path / "whole.jsonl")]) == 0
    num_whole_calls = runners[-1].num_calls
    output = tmp_path / "out.jsonl"
    real, calls = Spool.add, []

    def interrupt(spool: Spool, line: int, result: Any) -> None:
        calls.append(line)
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(spool, line, result)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "add", interrupt)
        assert main(["predict", str(model_dir), *flags, "--output", str(output)]) == 130
    assert not output.exists()
    with spool_path(output).open("a") as file:
        file.write('{"line": 12, "resu')  # as a kill in the middle of a write leaves it
    assert main(["predict", str(model_dir), *flags, "--output", str(output)]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert runners[-1].num_calls < num_whole_calls

    with monkeypatch.context() as patch:  # what was kept for other options is not taken over
        calls.clear()
        patch.setattr(Spool, "add", interrupt)
        other = str(tmp_path / "other.jsonl")
        assert main(["predict", str(model_dir), *flags, "--output", other]) == 130
    assert main(["predict", str(model_dir), *flags, "--output", other, "--ignore_eos", "--seed", "3"]) == 0
    assert len(read_lines(Path(other))) == 12


@pytest.mark.usefixtures("native_kernels")
def test_the_same_memory_holds_twice_the_blocks_of_bfloat16(model_dir: Path, runners: list[SumRunner]) -> None:
    command = ["predict", str(model_dir), "--prompt", "x", "--max_tokens", "2", "--cache_memory_bytes", "40960"]
    for dtype in ("float32", "bfloat16", "auto"):
        assert main([*command, "--kv_cache_dtype", dtype]) == 0
    assert [runner.num_blocks for runner in runners] == [40, 80, 40]  # the weights are float32


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with Spool(tmp_path / "out", {}, overwrite=False), pytest.raises(ConfigError, match="another process is writing"):
        Spool(tmp_path / "out", {}, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x" * 600], "exceed the 512 tokens"),
        (["--prompt", "x", "--block_size", "0"], "block_size is 0, allowed is an integer >= 1"),
        (["--prompt", "x", "--kv_cache_dtype", "fp8"], "kv_cache_dtype is 'fp8', allowed are 'auto', 'float32', 'bfl"),
        (["--prompt", "x", "--top_p", "2"], "top_p is 2.0, allowed is in (0, 1]"),
        (["--prompt", "x", "--output", "y"], "--input and --output go together"),
        (["--prompt", "x", "--raw", "--system", "s"], "a raw prompt has no system message"),
        (["--prompt", "x", "--add_bos_token"], "give --raw too"),
        (["--prompt", "x", "--adapter", "a"], "adapter 'a' is not loaded"),
        (["--prompt", "x", "--lora", "a=/nowhere"], "adapter_config.json cannot be read"),
        (["--prompt", "x", "--lora", "/nowhere"], "adapter_config.json cannot be read"),
        (["--prompt", "x", "--lora", "/nowhere", "--lora", "a=/nowhere"], "--lora /nowhere has no name"),
        (["--input", "{bad}", "--output", "out", "--strict"], "bad.jsonl:2: not JSON"),
        (["--input", "{none}", "--output", "out"], "holds no request; the first of 1 bad lines, 1: not JSON"),
        (["--input", "/nowhere", "--output", "out"], "No such file"),
        (["--input", "{bad}", "--output", "{bad}"], "exists; remove it"),
        (["--input", "{bad}", "--output", "/nowhere/out"], "/nowhere does not exist"),
    ],
)
def test_errors_come_before_the_model(
    flags: list[str],
    message: str,
    model_dir: Path,
    runners: list[SumRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"bad": write_lines(tmp_path / "bad.jsonl", [{"prompt": "x"}, "{"])}
    files["none"] = write_lines(tmp_path / "none.jsonl", ["{"])
    before = sorted(tmp_path.iterdir())
    assert main(["predict", str(model_dir), *(flag.format(**files) for flag in flags)]) == 1
    assert message in capsys.readouterr().err
    assert runners == []
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_alone_needs_no_name(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    config, stem = ModelConfig.from_pretrained(model_dir), "model.layers.0.attention.wv"
    a, b = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    adapter = tmp_path / "adapter"
    AdapterFiles(model_dir, config, Lora(("attention.wv",), rank=2, alpha=64)).save(
        adapter, {f"{stem}.lora_a": a, f"{stem}.lora_b": b}, 1, {}
    )
    said = []
    for flags in ([], ["--lora", str(adapter)], ["--lora", f"a={adapter}", "--adapter", "a"]):
        sizes = ["--max_tokens", "8", "--temperature", "0", "--num_blocks", "8", "--block_size", "4"]
        assert main(["predict", str(model_dir), "--raw", "--prompt", "x", *sizes, *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[1] == said[2] != said[0]


def talk(model_dir: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", str(model_dir), "--temperature", "0", "--max_tokens", "6", "--block_size", "4"])


def test_a_chat_on_pipes(
    model_dir: Path,
    runners: list[SumRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved.json"
    lines = ["/system brief", "first\\", "line", '"""', "/reset", "is text here", '"""', "/stats", f"/save {saved}"]
    assert talk(model_dir, monkeypatch, *lines, "/reset", "/set max_tokens=2", "/set", "again", "/exit", "lost") == 0
    output = capsys.readouterr()
    prompt = list(b"[system:brief][user:first\nline]")
    content = json.loads(saved.read_text())
    assert [message["role"] for message in content["messages"]] == ["user", "assistant"] * 2
    assert content["messages"][0]["content"] == "first\nline"
    assert content["messages"][2]["content"] == "/reset\nis text here"
    assert content["system"] == "brief"
    first = bytes(t for t in continued(prompt, 6) if t < 256).decode(errors="replace")
    assert output.out.startswith(first)
    assert content["messages"][1]["content"] == first
    assert "2 turns" in output.out
    assert " 0 of them" not in output.out  # the second turn found the first in the cache
    assert "max_tokens=2" in output.out
    assert "lost" not in output.out
    assert output.err == ""


def test_errors_in_a_chat_do_not_end_it(
    model_dir: Path, runners: list[SumRunner], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/what", "/set top_p=9", "/set n=2", "/set x", "/adapter a", "/save", "y" * 600, "/stats"]
    assert talk(model_dir, monkeypatch, *lines) == 0
    output = capsys.readouterr()
    said = ["no command /what", "top_p is 9.0", "n is 1 in a chat", "'x' is not of the form", "'a' is not loaded",
            "needs the name of a file", "the context 512; /reset"]  # fmt: skip
    assert [text in line for text, line in zip(said, output.err.splitlines(), strict=True)] == [True] * len(said)
    assert "0 turns" in output.out


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    model_dir: Path, runners: list[SumRunner], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = SumRunner.forward

    def forward(runner: SumRunner, batch: Any) -> Any:
        if runner.num_calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(runner, batch)

    monkeypatch.setattr(SumRunner, "forward", forward)
    assert talk(model_dir, monkeypatch, "/set max_tokens=50", "hello", "/stats") == 0
    output = capsys.readouterr().out
    assert "[stopped]" in output
    generated = int(output.split(" generated")[0].split()[-1])
    assert 0 < generated < 50


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_ctrl_c_while_mindspore_is_imported(delay_s: float, model_dir: Path) -> None:
    command = [sys.executable, "-m", "llama31_core", "predict", str(model_dir), "--prompt", "hello"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "mindspore" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert (process.returncode, errors) == (130, "llama31-core: interrupted\n")
