"""`llama31-core finetune`: a YAML file and MindRecord data in, a trained model directory out."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from llama31_core.checkpoint.staging import staged_file
from llama31_core.commands.answers import decode_answer
from llama31_core.commands.interrupts import importing_mindspore
from llama31_core.commands.prompts import PromptEncoder
from llama31_core.errors import Llama31Error
from llama31_core.run_config import RunConfig, load_run_config
from llama31_tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama31_core.training.report import EvalReport, Observer, StepReport
    from llama31_core.training.trainer import Trainer


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    text = "train a model directory on MindRecord data"
    parser = commands.add_parser("finetune", parents=[shared], help=text, description=text)
    parser.add_argument("config", type=Path, help="a YAML file, for instance configs/finetune_smollm2_135m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="put over the file's values")
    parser.set_defaults(run=run)


class Console:
    """Prints a line a step and an evaluation, and on a terminal a bar beside."""

    def __init__(self, num_steps: int, start_step: int, tokenizer: Tokenizer | None, prompts: tuple[str, ...]) -> None:
        self.losses: list[float] = []
        self._tokenizer, self._prompts = tokenizer, prompts
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", file=sys.stderr, disable=None)

    def on_step(self, report: StepReport) -> None:
        """Its line."""
        self.losses.append(report.loss)
        self._print(str(report))
        self._bar.update()

    def on_evaluation(self, report: EvalReport) -> None:
        """Its line, and the samples."""
        self._print(str(report))
        for prompt, ids in zip(self._prompts, report.samples, strict=False):
            assert self._tokenizer is not None
            self._print(f"  > {prompt}\n  {decode_answer(self._tokenizer, ids)}")

    def _print(self, line: str) -> None:
        with tqdm.external_write_mode(sys.stdout):
            print(line, flush=True)

    def close(self) -> None:
        """No more bar."""
        self._bar.close()


def run(arguments: argparse.Namespace) -> int:
    """Print a line a step, and where the trained model is."""
    config = load_run_config(arguments.config, arguments.overrides)
    tokenizer = Tokenizer.from_pretrained(config.load_checkpoint) if config.eval_prompts else None
    prompts = [] if tokenizer is None else [PromptEncoder(tokenizer).encode_prompt(p) for p in config.eval_prompts]
    if config.parallel.world_size > 1:
        return _run_rank(config, str(arguments.config))
    with importing_mindspore():  # seconds: after the file is known to be good
        from llama31_core.training.trainer import Trainer

    trainer = Trainer(config, str(arguments.config), prompts)
    return _train(config, trainer, tokenizer)


def _run_rank(config: RunConfig, source: str) -> int:
    """The run on one of several ranks: rank 0 speaks for all, and what stops one at the start stops all."""
    from llama31_core.parallel.launch import find_rank

    find_rank(config.parallel, source)
    with importing_mindspore():
        from llama31_core.parallel.run import join_run
        from llama31_core.training.trainer import Trainer

    ranks, problem, trainer = join_run(config, source), "", None
    try:
        trainer = Trainer(config, source, ranks=ranks)
    except Llama31Error as error:
        problem = str(error)
    ranks.agree({}, problem)
    assert trainer is not None
    if ranks.is_first:
        return _train(config, trainer, None)
    trainer.train((), _note_sigterm())
    return 0


def _note_sigterm() -> Callable[[], bool]:
    """From now on SIGTERM is noted and ends nothing; gives whether it has come."""
    terminated = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    return terminated.is_set


def _train(config: RunConfig, trainer: Trainer, tokenizer: Tokenizer | None) -> int:
    """Train, and say how it goes."""
    size = trainer.config.num_parameters
    print(f"{size:,} parameters, {trainer.num_steps} steps; the first one compiles", flush=True)
    if trainer.start_step:
        print(f"resumed after step {trainer.start_step}", flush=True)
    console = Console(trainer.num_steps, trainer.start_step, tokenizer, config.eval_prompts)
    is_terminated = _note_sigterm()
    try:
        model_dir = trainer.train([console, *_recorders(config, trainer, tokenizer)], is_terminated)
    finally:
        console.close()
    return _conclude(model_dir, console.losses)


def _recorders(config: RunConfig, trainer: Trainer, tokenizer: Tokenizer | None) -> list[Observer]:
    """What writes metrics; the configuration is written beside them."""
    from llama31_core.training.metrics import MetricsFile, TensorBoard

    directory = Path(config.output_dir)
    decode = None if tokenizer is None else (lambda ids: decode_answer(tokenizer, ids))
    recorders: list[Observer] = []
    if config.tensorboard is not None:
        recorders.append(TensorBoard(directory / config.tensorboard.tensorboard_dir, trainer.start_step))
    recorders.append(MetricsFile(directory, trainer.start_step, decode))
    values = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    with staged_file(directory / "run.yaml", overwrite=True) as part:
        part.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return recorders


def _conclude(model_dir: Path, losses: list[float]) -> int:
    if model_dir.parent.name == "checkpoints":
        print(f"stopped by SIGTERM; {model_dir} is where resume_training=True goes on", flush=True)
        return 0
    if not losses:
        print(f"saved {model_dir}; all steps had been taken before")
        return 0
    few = max(1, len(losses) // 4)
    print(f"mean loss: {mean(losses[:few]):.4f} in the first {few} steps, {mean(losses[-few:]):.4f} in the last {few}")
    print(f"saved {model_dir}")
    return 0
