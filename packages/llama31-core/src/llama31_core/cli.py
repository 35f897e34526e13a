"""The command line: `llama31-core predict` and `llama31-core finetune`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from llama31_core import __version__
from llama31_core.errors import Llama31Error
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.run_config import load_run_config
from llama31_tokenizer import ChatFormat, StreamDecoder, Tokenizer
from llama31_tokenizer.errors import Llama31Error as TokenizerSideError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error of input or environment, 2 on wrong usage."""
    arguments = _build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a mark for it
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
    try:
        command = {"predict": predict, "finetune": finetune}[arguments.command]
        return command(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; what is left goes nowhere
        return 0
    except (Llama31Error, TokenizerSideError, OSError) as error:
        if arguments.debug:
            raise
        print(f"llama31-core: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llama31-core: interrupted", file=sys.stderr)
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama31-core", description="Llama 3.1 on MindSpore.")
    parser.add_argument("--version", action="version", version=__version__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    predictor = commands.add_parser("predict", parents=[shared], help="complete a prompt")
    predictor.add_argument("model_dir", type=Path, help="a model directory, as llama31-ckpt convert writes it")
    predictor.add_argument("--prompt", required=True, help="what the user says")
    predictor.add_argument("--raw", action="store_true", help="complete the prompt as it is, with no chat format")
    predictor.add_argument("--add_bos_token", action="store_true", help="begin a raw prompt with the model's bos token")
    predictor.add_argument("--max_tokens", type=int, default=256, help="tokens to generate at most (256)")
    predictor.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (0)")
    predictor.add_argument("--top_k", type=int, default=0, help="sample among the k most likely tokens (0: all)")
    predictor.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the likeliest tokens up to p (1: all)"
    )
    predictor.add_argument("--seed", type=int, help="makes sampling repeatable")
    predictor.add_argument("--max_seq_len", type=int, help="tokens of prompt and answer (what context and cache hold)")

    trainer = commands.add_parser("finetune", parents=[shared], help="train a model directory on MindRecord data")
    trainer.add_argument("config", type=Path, help="a YAML file, for instance configs/finetune_smollm2_135m.yaml")
    trainer.add_argument("overrides", nargs="*", metavar="section.key=value", help="put over the file's values")
    return parser


def predict(arguments: argparse.Namespace) -> int:
    """Print the answer as it is generated; figures go to stderr."""
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    tokenizer = Tokenizer.from_pretrained(arguments.model_dir)
    if arguments.raw:
        prompt = tokenizer.encode(arguments.prompt, bos=arguments.add_bos_token)
    else:
        messages = [{"role": "user", "content": arguments.prompt}]
        prompt = ChatFormat(tokenizer).encode_dialog(messages, add_generation_prompt=True).ids
    engine = Engine.from_pretrained(arguments.model_dir, max_seq_len=arguments.max_seq_len, max_batch_size=1)
    engine.add("predict", prompt, params)
    decoder = StreamDecoder(tokenizer)
    num_tokens, started = 0, time.perf_counter()
    while engine.has_unfinished():
        for output in engine.step():
            num_tokens += len(output.token_ids)
            print(decoder.push(output.token_ids), end="", flush=True)
    print(decoder.flush())
    elapsed_s = time.perf_counter() - started
    print(f"{len(prompt)} prompt tokens, {num_tokens} generated in {elapsed_s:.1f} s", file=sys.stderr)
    return 0


def finetune(arguments: argparse.Namespace) -> int:
    """Print a line a step, and where the trained model is."""
    run = load_run_config(arguments.config, arguments.overrides)
    # MindSpore takes seconds to import: after the file is known to be good.
    from llama31_core.training.trainer import StepReport, Trainer

    trainer = Trainer(run, str(arguments.config))
    size = trainer.config.num_parameters
    print(f"{size:,} parameters, {trainer.num_steps} steps; the first one compiles", flush=True)
    losses: list[float] = []

    def report(step: StepReport) -> None:
        losses.append(step.loss)
        print(step, flush=True)

    model_dir = trainer.train(report)
    few = max(1, len(losses) // 4)
    print(f"mean loss: {mean(losses[:few]):.4f} in the first {few} steps, {mean(losses[-few:]):.4f} in the last {few}")
    print(f"saved {model_dir}")
    return 0
