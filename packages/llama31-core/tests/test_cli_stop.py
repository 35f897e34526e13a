"""Stop strings of predict and chat: the text ends before one, the tokens with the one that completes it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from llama31_core.cli import main
from llama31_core.inference.sum_runner import SumRunner

PROMPT = list(b"hello")


def said(count: int, prompt: list[int] = PROMPT) -> list[int]:
    """What SumRunner says after the prompt."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(SumRunner(258).next_token(ids))
    return ids[len(prompt) :]


def text(ids: list[int]) -> str:
    return bytes(token for token in ids if token < 256).decode(errors="replace")


def test_a_printed_answer_ends_before_it(
    model_dir: Path, runners: list[SumRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = text(said(40))
    stop = whole[20:23]
    command = ["predict", str(model_dir), "--raw", "--prompt", "hello", "--max_tokens", "40"]
    assert main([*command, "--stop", "never said", "--stop", stop]) == 0
    printed = capsys.readouterr()
    assert printed.out == whole[: whole.index(stop)] + "\n"
    num_calls = runners[0].num_calls
    assert main(command) == 0
    assert num_calls < runners[1].num_calls  # nothing was computed behind it

    assert main([*command, "--stop", stop, "--n", "2", "--temperature", "0.001", "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"[1] {whole[: whole.index(stop)]}\n")


def test_records_have_their_own(model_dir: Path, runners: list[SumRunner], tmp_path: Path) -> None:
    whole = text(said(40))
    stop, other = whole[20:23], whole[10:12]
    lines = [{"prompt": "hello"}, {"prompt": "hello", "stop": [other]}, {"prompt": "hello", "stop": []},
             {"prompt": "hello", "stop": ""}, {"prompt": "hello", "stop": [1]}]  # fmt: skip
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--raw", "--max_tokens", "40", "--stop", stop, "--logprobs", "0", "--num_speculative_tokens", "3"]
    assert main(["predict", str(model_dir), "--input", str(source), "--output", str(output), *flags]) == 0
    answers = [json.loads(line)["completions"][0] for line in output.read_text().splitlines()]
    assert [answer["text"] for answer in answers] == [whole[: whole.index(stop)], whole[: whole.index(other)], whole]
    assert [answer["finish_reason"] for answer in answers] == ["stop", "stop", "length"]
    for answer in answers:
        assert answer["token_ids"] == said(len(answer["token_ids"]))
        assert len(answer["logprobs"]) == len(answer["token_ids"])
    assert text(answers[1]["token_ids"]).endswith(other)
    rejects = Path(f"{output}.rejects.jsonl").read_text()
    assert "stop is '', expected a text or a list of texts" in rejects
    assert "stop is [1], expected" in rejects


def test_a_chat_remembers_what_was_shown(
    model_dir: Path, runners: list[SumRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text(said(30, list(b"[user:hello]")))
    stop = whole[12:14]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n/save {tmp_path / 'saved.json'}\n"))
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    assert main(["chat", str(model_dir), "--temperature", "0", "--max_tokens", "30", "--stop", stop]) == 0
    messages = json.loads((tmp_path / "saved.json").read_text())["messages"]
    assert messages[1]["content"] == whole[: whole.index(stop)]
    assert printed.getvalue().startswith(messages[1]["content"] + "\n")


@pytest.mark.parametrize("command", ["predict", "chat"])
def test_an_empty_one_is_refused(command: str, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "hello"] if command == "predict" else []
    assert main([command, str(model_dir), *prompt, "--stop", ""]) == 1
    assert "expected a text or a list of texts, none of them empty" in capsys.readouterr().err
