"""`llama31-core eval`: a model directory in; held-out loss and perplexity, or results of the harness's tasks, out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.staging import check_destination, staged_file
from llama31_core.commands.interrupts import importing_mindspore
from llama31_core.commands.lm_eval_model import build_lm
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.lora.adapter import read_adapter
from llama31_tokenizer import Tokenizer


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    text = "loss and perplexity on held-out data, or tasks of the lm-evaluation-harness"
    parser = commands.add_parser("eval", parents=[shared], help=text, description=text)
    parser.add_argument("model_dir", type=Path, help="a model directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="PATH", help="MindRecord of llama31-data")
    what.add_argument("--tasks", metavar="NAME,…", help="of the harness (pip install lm-eval)")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="a PEFT adapter over the model")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="sequences at once (2)")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--include_path", type=Path, metavar="DIR", help="task files (YAML) beside the harness's own")
    tasks.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    tasks.add_argument("--apply_chat_template", action="store_true", help="put questions as what a user says")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the figures."""
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch_size is {arguments.batch_size}, expected 1 or more")
    if arguments.output is not None:
        check_destination(arguments.output)
    figures = _evaluate_data(arguments) if arguments.data is not None else _evaluate_tasks(arguments)
    if arguments.output is not None:
        with staged_file(arguments.output) as part:
            part.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def _evaluate_data(arguments: argparse.Namespace) -> dict[str, Any]:
    config = ModelConfig.from_pretrained(arguments.model_dir)
    with importing_mindspore():
        from llama31_core.training.dataset import MindRecordDataset, read_seq_length
        from llama31_core.training.evaluation import evaluate, load_for_evaluation

    seq_length = read_seq_length(arguments.data)
    dataset = MindRecordDataset(
        arguments.data, config, seq_length=seq_length, batch_size=1, seed=None, num_workers=1,
        tokenizer_dir=arguments.model_dir,
    )  # fmt: skip
    result = evaluate(load_for_evaluation(arguments.model_dir, arguments.lora), dataset, arguments.batch_size)
    print(
        f"loss: {result.loss:.4f}, perplexity: {result.perplexity:.3f} over {result.num_label_tokens} label tokens of "
        f"{dataset.num_records} records"
    )
    print(f"{result.elapsed_s:.1f} s", file=sys.stderr)
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "num_label_tokens": result.num_label_tokens,
        "num_records": dataset.num_records,
    }


def _evaluate_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ConfigError(f"--tasks needs the lm-evaluation-harness ({error}): pip install lm-eval") from error
    tokenizer = Tokenizer.from_pretrained(arguments.model_dir)
    adapter = None if arguments.lora is None else read_adapter(arguments.lora)
    slots: dict[str, Any] = {} if adapter is None else {"max_loras": 1, "max_lora_rank": adapter.rank}
    with importing_mindspore():
        import mindspore  # noqa: F401
    engine = Engine.from_pretrained(arguments.model_dir, EngineOptions(max_batch_size=arguments.batch_size, **slots))
    if adapter is not None:
        engine.load_adapter("eval", adapter)
    include = None if arguments.include_path is None else str(arguments.include_path)
    results: dict[str, Any] = simple_evaluate(
        model=build_lm(engine, tokenizer, None if adapter is None else "eval"),
        tasks=arguments.tasks.split(","),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        task_manager=TaskManager(include_path=include),
        bootstrap_iters=1000,
    )
    print(make_table(results))
    return {"results": results["results"], "versions": results.get("versions"), "n-shot": results.get("n-shot")}
