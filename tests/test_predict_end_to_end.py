"""predict and chat with SmolLM2 as processes: the answer on the terminal, a file through the batch, a talk on pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWER = "The capital of France is Paris."
TIMEOUT_S = 300


def run(*arguments: str, said: str = "") -> tuple[str, str]:
    command = [sys.executable, "-m", "llama31_core", *arguments]
    result = subprocess.run(command, input=said, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_a_file_gives_what_single_prompts_give(smollm2_dir: Path, tmp_path: Path) -> None:
    question = "What is the capital of France?"
    limits = ["--max_seq_len", "512", "--max_tokens", "24"]
    printed, figures = run("predict", str(smollm2_dir), "--prompt", question, *limits)
    assert printed == ANSWER + "\n"
    assert "37 prompt tokens, 7 generated" in figures
    records: list[dict[str, Any]] = [
        {"id": f"q{n}", "prompt": question if n % 3 == 0 else f"Count to {n}."} for n in range(9)
    ]
    records[4] = {"id": "q4", "messages": [{"role": "user", "content": question}], "max_tokens": 3}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, figures = run("predict", str(smollm2_dir), "--input", str(source), "--output", str(output), *limits)
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["id"] for result in results] == [record["id"] for record in records]
    texts = [result["completions"][0]["text"] for result in results]
    assert [texts[0], texts[3], texts[6]] == [ANSWER] * 3
    assert texts[4] == "The capital of"
    assert results[4]["completions"][0]["finish_reason"] == "length"
    assert "9 records" in figures
    assert "tokens/s" in figures


def test_a_talk_remembers_and_finds_its_beginning_in_the_cache(smollm2_dir: Path) -> None:
    said = "What is the capital of France?\nAnd of Spain?\n/stats\n/exit\n"
    printed, errors = run("chat", str(smollm2_dir), "--temperature", "0", "--max_seq_len", "512", said=said)
    lines = printed.splitlines()
    assert lines[0] == ANSWER
    assert "Madrid" in lines[1]
    assert lines[2].startswith("2 turns")
    assert " 0 of them" not in lines[2]
    assert "error" not in errors
