"""The command line: every command, standard input, and errors in one line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama31_tokenizer import ChatFormat, Tokenizer
from llama31_tokenizer.cli import _batches, main
from llama31_tokenizer.llama3 import GENUINE_SHA256


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[Any], str]:
    """Exit status, JSON lines of the output, and the error output."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def test_encode_files_lines_and_texts(
    llama3: Tokenizer, llama3_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\ntwo 你好\n".encode())
    model = ("--model", llama3_file)
    assert run(capsys, "encode", *model, file)[1] == [{"source": str(file), "ids": llama3.encode("one\r\ntwo 你好\n")}]
    lines = run(capsys, "encode", *model, "--lines", "--bos", "--eos", file)[1]
    assert [line["ids"] for line in lines] == [llama3.encode(t, bos=True, eos=True) for t in ("one\r", "two 你好")]
    assert [line["source"] for line in lines] == [f"{file}:1", f"{file}:2"]
    (tmp_path / "a.jsonl").write_text('{"t": "x <|eot_id|>"}\n{"t": "y"}\n')
    found = run(capsys, "encode", *model, "--jsonl", "t", "--allow-special", tmp_path / "a.jsonl")[1]
    assert [line["ids"][-1] for line in found] == [128_009, 88]
    (offsets,) = run(capsys, "encode", *model, "--offsets", "--text", "é a")[1]
    assert (offsets["chars"], offsets["bytes"]) == ([[0, 1], [1, 3]], [[0, 2], [2, 4]])


def test_count_reads_standard_input(
    llama3: Tokenizer, llama3_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one two\r\n")))
    status, lines, err = run(capsys, "count", "--model", llama3_file, "--threads", "2")
    assert (status, lines) == (0, [{"source": "-", "tokens": 3, "characters": 9}])
    assert err == "3 tokens\n"


def test_decode_reads_what_encode_writes(
    llama3: Tokenizer, llama3_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = llama3.encode("hi 😀", bos=True)
    (tmp_path / "ids").write_text(f"{json.dumps({'ids': ids})}\n\n{json.dumps(ids)}\n{' '.join(map(str, ids))}\n")
    assert main(["decode", "--model", str(llama3_file), "--skip-special", str(tmp_path / "ids")]) == 0
    assert capsys.readouterr().out == "hi 😀\n" * 3
    assert main(["decode", "--model", str(llama3_file), "--ids", "128000 64"]) == 0
    assert capsys.readouterr().out == "<|begin_of_text|>a\n"


def test_chat(llama3: Tokenizer, llama3_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(messages)}\n{json.dumps({'messages': messages})}\n")
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    dialog = ChatFormat(llama3).encode_dialog(messages)
    lines = run(capsys, "chat", "--model", llama3_file, tmp_path / "d.jsonl")[1]
    assert [line["ids"] for line in lines] == [dialog.ids] * 2
    assert lines[0]["assistant_spans"] == [list(span) for span in dialog.assistant_spans]
    arguments = ["--text", "--generation-prompt", "--date", "1 May 2025", "--tools", str(tmp_path / "tools.json")]
    assert main(["chat", "--model", str(llama3_file), *arguments, str(tmp_path / "d.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "Today Date: 1 May 2025" in text
    assert '"name": "f"' in text
    assert text.endswith("assistant<|end_header_id|>\n\n\n")


def test_inspect(llama3_file: Path, smollm2_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", str(llama3_file)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["sha256"], facts["genuine"], facts["vocab_size"]) == (GENUINE_SHA256, True, 128_256)
    assert main(["inspect", "--model", str(smollm2_file)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["genuine"], facts["pre_tokenizer"]) == ("gguf", False, "smollm")


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        (["encode", "none.txt"], {}, "none.txt"),
        (["encode", "--offsets", "--bos", "--text", "a"], {}, "--offsets is for plain texts"),
        (["encode", "--jsonl", "t", "f"], {"f": '{"u": 1}'}, "f:1: no text under 't'"),
        (["encode", "--jsonl", "t", "f"], {"f": "{"}, "f:1: not JSON"),
        (["encode", "--threads", "0", "--text", "a"], {}, "num_threads is 0"),
        (["encode", "f"], {"f": b"\xff"}, "f: byte 0 is not UTF-8"),
        (["decode", "--ids", "128256"], {}, "ids[0] is 128256"),
        (["decode", "f"], {"f": "1 two"}, "f:1: not ids"),
        (["decode", "f"], {"f": "[1.5]"}, "f:1: not a list of ids"),
        (["chat", "f"], {"f": '[{"role": "x", "content": ""}]'}, "f:1: messages[0].role is 'x'"),
        (["chat", "f"], {"f": "3"}, "f:1: messages must be a non-empty list"),
        (["chat", "f"], {"f": "[3]"}, "f:1: messages[0] is a int"),
        (["chat", "--tools", "t", "f"], {"t": '{"name": "f"}', "f": "[{}]"}, "f:1: tools must be a list"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    files: dict[str, str | bytes],
    message: str,
    llama3_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in files.items():
        Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert main([arguments[0], "--model", str(llama3_file), *arguments[1:]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llama31-tokenizer: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_many_short_lines_are_one_batch_for_threads_and_long_texts_are_not() -> None:
    lines = [("f", "a line of text")] * 40_000
    assert [len(batch) for batch in _batches(iter(lines))] == [16_384, 16_384, 7_232]
    texts = [("f", "x" * 1_500_000)] * 5
    assert [len(batch) for batch in _batches(iter(texts))] == [2, 2, 1]


def test_usage_errors_and_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LLAMA31_TOKENIZER", raising=False)
    for arguments in ([], ["encode"], ["nope"], ["encode", "--model", "x", "--threads", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(Exception, match="cannot be read"):
        main(["encode", "--debug", "--model", "/none/such", "--text", "a"])


def test_module_and_closed_pipe(llama3_file: Path) -> None:
    command = f"{sys.executable} -m llama31_tokenizer encode --model {llama3_file} --lines | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], input="a\n" * 100_000, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == '{"source": "-:1", "ids": [64]}\n'


def test_version_and_engine(llama3_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"llama31-tokenizer \d+\.\d+\.\d+\n", capsys.readouterr().out)
    lines = []
    for engine in ("tiktoken", "fastokens"):
        assert main(["encode", "--model", str(llama3_file), "--engine", engine, "--text", "Hello world"]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] == '{"source": "--text", "ids": [9906, 1917]}\n'


def test_a_missing_model_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--model", "nope", "--text", "x"]) == 1
    assert capsys.readouterr().err.count("nope") == 1
