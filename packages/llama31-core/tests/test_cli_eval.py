"""`llama31-core eval`: perplexity as training computes it, and the harness's questions as torch answers them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama31_core import Engine, SamplingParams
from llama31_core.checkpoint import save_weights
from llama31_core.checkpoint.names import spell
from llama31_core.cli import main
from llama31_core.commands.lm_eval_model import EngineScorer
from llama31_core.config import ModelConfig
from llama31_core.training.checkpoints import AdapterFiles
from llama31_core.training.lora import Lora
from llama31_tokenizer import Tokenizer

Weights = dict[str, npt.NDArray[np.float32]]
LORA = Lora(("attention.wq",), rank=2, alpha=6)


@pytest.fixture
def weights(model_dir: Path, random_weights: Callable[..., Weights]) -> Weights:
    """Put into the directory, whose tokenizer is of single bytes."""
    values = random_weights(ModelConfig.from_pretrained(model_dir))
    save_weights(model_dir / "model.safetensors", values.items(), overwrite=True)
    return values


def torch_log_probs(config: ModelConfig, weights: Weights, ids: list[int]) -> npt.NDArray[np.float32]:
    """(T, V), of what follows each token."""
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    model.load_state_dict({spell(name, "hf"): torch.from_numpy(value) for name, value in weights.items()})
    with torch.no_grad():
        scores: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    return scores


def test_perplexity_is_over_every_label_with_an_adapter_too(
    run_file: Path, tmp_path: Path, random_weights: Callable[..., Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.preset("tiny")
    values = random_weights(config)
    rng = np.random.default_rng(2)
    held_out = rng.integers(0, config.vocab_size, (7, 17))  # as the fixture wrote them
    want = [-torch_log_probs(config, values, row[:-1].tolist())[range(16), row[1:]] for row in held_out]
    data = tmp_path / "held_out.mindrecord"
    (tmp_path / "held_out.mindrecord.manifest.json").write_text(json.dumps({"seq_length": 16, "vocab_size": 512}))
    output = tmp_path / "figures.json"
    assert main(["eval", str(tmp_path / "source"), "--data", str(data), "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["loss"] == pytest.approx(np.mean(want), rel=1e-5)
    assert (figures["num_records"], figures["num_label_tokens"]) == (7, 112)
    assert f"perplexity: {np.exp(np.mean(want)):.3f} over 112 label tokens of 7 records" in capsys.readouterr().out

    a, b = rng.normal(size=(2, 64)).astype(np.float32), rng.normal(size=(64, 2)).astype(np.float32)
    stem = "model.layers.1.attention.wq"
    files = AdapterFiles(tmp_path / "source", config, LORA)
    files.save(tmp_path / "adapter", {f"{stem}.lora_a": a, f"{stem}.lora_b": b}, 1, {})
    values[f"{stem}.weight"] = values[f"{stem}.weight"] + 3 * b @ a
    want = [-torch_log_probs(config, values, row[:-1].tolist())[range(16), row[1:]] for row in held_out]
    output.unlink()
    more = ["--lora", str(tmp_path / "adapter"), "--batch_size", "3", "--output", str(output)]
    assert main(["eval", str(tmp_path / "source"), "--data", str(data), *more]) == 0
    assert json.loads(output.read_text())["loss"] == pytest.approx(np.mean(want), rel=1e-5)


def test_continuations_score_as_with_torch(model_dir: Path, weights: Weights) -> None:
    tokenizer, config = Tokenizer.from_pretrained(model_dir), ModelConfig.from_pretrained(model_dir)
    scorer = EngineScorer(Engine.from_pretrained(model_dir, max_seq_len=20, num_blocks=16), tokenizer)
    greedy = [int(torch_log_probs(config, weights, list(b"abc"))[-1].argmax())]
    pairs = [(list(b"The cat "), list(b"sat")), (list(b"abc"), greedy), (list(b"0123456789" * 3), list(b"xy"))]
    scores = scorer.score(pairs)
    for (context, continuation), (score, is_greedy) in zip(pairs, scores, strict=True):
        ids = (context + continuation)[-19:]  # the beginning of what does not fit is left out
        log_p = torch_log_probs(config, weights, ids)[-len(continuation) - 1 : -1]
        assert score == pytest.approx(log_p[range(len(continuation)), continuation].sum(), abs=1e-3)
        assert is_greedy == (log_p.argmax(-1).tolist() == continuation)
    assert scores[1][1]


def test_a_completion_ends_before_the_first_stop(model_dir: Path, weights: Weights) -> None:
    tokenizer = Tokenizer.from_pretrained(model_dir)
    engine = Engine.from_pretrained(model_dir, max_seq_len=40, num_blocks=16)
    scorer, params = EngineScorer(engine, tokenizer), SamplingParams(max_tokens=12, temperature=0)
    whole = scorer.complete(list(b"abc"), [], params)
    stop = whole[5:7]
    assert stop
    assert scorer.complete(list(b"abc"), [stop, whole[8:]], params) == whole[: whole.index(stop)]
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/none"], "holds no MindRecord file"),
        (["--data", "{tmp}/held_out.mindrecord"], "says no seq_length"),
        (["--data", "/none", "--batch_size", "0"], "expected 1 or more"),
        (["--data", "/none", "--output", "{tmp}/run.yaml"], "exists"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    arguments: list[str], message: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["eval", str(tmp_path / "source"), *given]) == 1
    assert message in capsys.readouterr().err


TASK = """
task: parity_of_torch
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_a_task_of_the_harness_is_answered_as_torch_answers_it(
    model_dir: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy on questions whose answers are torch's own choices is 1, and with one of them turned it is 3/4."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = ModelConfig.from_pretrained(model_dir)
    rows: list[dict[str, Any]] = []
    for question in ("One", "Two", "Three", "Four"):
        choices = ["yes", "no.", "eh?"]
        scores = []
        for choice in choices:
            ids = list(f"{question} {choice}".encode())
            log_p = torch_log_probs(config, weights, ids)[len(question) - 1 : -1]
            scores.append(log_p[range(len(choice) + 1), ids[len(question) :]].sum())
        rows.append({"question": question, "choices": choices, "answer": int(np.argmax(scores))})
    for turned, accuracy in ((0, 1.0), (1, 0.75)):
        folder = tmp_path / f"tasks{turned}"
        folder.mkdir()
        asked = [row | {"answer": (row["answer"] + (i < turned)) % 3} for i, row in enumerate(rows)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        (folder / "task.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
        output = folder / "results.json"
        more = ["--tasks", "parity_of_torch", "--include_path", str(folder), "--output", str(output)]
        assert main(["eval", str(model_dir), *more]) == 0
        assert json.loads(output.read_text())["results"]["parity_of_torch"]["acc,none"] == accuracy
