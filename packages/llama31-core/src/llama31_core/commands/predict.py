"""`llama31-core predict`: a prompt in, its answer out as it is generated; or a file of requests, one of results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama31_core.commands.batch import Batch, run_batch
from llama31_core.commands.engine_options import EngineSetup, add_engine_options, plan_engine
from llama31_core.commands.model_source import add_source_arguments, load_source
from llama31_core.commands.prompts import PromptEncoder
from llama31_core.commands.records import Record, RecordReader, stop_strings
from llama31_core.commands.sampling_options import add_sampling_options, given_options
from llama31_core.commands.terminal import AnswerPrinter
from llama31_core.errors import ConfigError
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.sampling_params import SamplingParams

DEFAULTS: Mapping[str, Any] = {"max_tokens": 256, "temperature": 0.0}


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "predict", parents=[shared], help="complete a prompt, or a file of them", description=__doc__
    )
    add_source_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what the user says; repeatable")
    what.add_argument("--input", type=Path, metavar="FILE", help="JSON Lines of prompt, messages or token_ids")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results of --input go, as JSON Lines")
    parser.add_argument("--strict", action="store_true", help="a bad line ends the run before it begins")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--raw", action="store_true", help="complete prompts as they are, with no chat format")
    parser.add_argument("--add_bos_token", action="store_true", help="begin raw prompts with the model's bos token")
    parser.add_argument("--system", metavar="TEXT", help="what the system says first")
    parser.add_argument("--echo", action="store_true", help="print each prompt before its answer")
    add_sampling_options(parser, DEFAULTS)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the answers, or write the results; figures go to stderr."""
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output go together: a file of requests and one of results")
    source = load_source(arguments)
    add_bos_token = arguments.add_bos_token or (arguments.raw and source.add_bos_token)
    encoder = PromptEncoder(source.tokenizer, arguments.raw, add_bos_token, arguments.system)
    defaults = given_options(
        arguments, DEFAULTS if source.sampling is None else {"seed": source.seed, **source.sampling}
    )
    params = SamplingParams(**defaults)  # what is wrong for all records is said once, before anything else
    sizes = dict(source.engine)
    if source.max_length is not None and "max_tokens" not in defaults:
        defaults["max_tokens"], sizes["max_seq_len"] = None, source.max_length
        params = replace(params, max_tokens=None)
    if arguments.input is not None:
        setup = plan_engine(arguments, source, **sizes)
        setup.follow()
        return predict_file(arguments, setup, encoder, defaults)
    places = len(arguments.prompt) * max(params.n, params.num_beams)
    sizes["max_batch_size"] = min(places, max(params.n, params.num_beams, EngineOptions.max_batch_size))
    setup = plan_engine(arguments, source, **sizes)
    setup.follow()
    predict_prompts(arguments, setup, encoder, params)
    return 0


def predict_prompts(
    arguments: argparse.Namespace, setup: EngineSetup, encoder: PromptEncoder, params: SamplingParams
) -> None:
    """Complete the prompts of a command line, all at once."""
    stop = stop_strings(arguments.stop)
    prompts = [encoder.encode_prompt(text) for text in arguments.prompt]
    for prompt_ids in prompts:
        setup.plan.check_request(prompt_ids, params)
    behind = "" if arguments.raw and params.n == 1 else "\n"
    heads = [text + behind if arguments.echo else "" for text in arguments.prompt]
    engine = setup.build()
    printer = AnswerPrinter(setup.tokenizer, params.n, stop, heads)
    started = time.perf_counter()
    printer.run(engine, prompts, params, arguments.adapter)
    elapsed_s = max(time.perf_counter() - started, 1e-9)
    answers = [answer for collector in printer.collectors for answer in collector.answers]
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    _warn(
        f"{sum(map(len, prompts))} prompt tokens, {num_tokens} generated in {elapsed_s:.1f} s: "
        f"{num_tokens / elapsed_s:.1f} tokens/s"
    )
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise ConfigError(f"the model could not go on: {errors[0]}")


def predict_file(
    arguments: argparse.Namespace, setup: EngineSetup, encoder: PromptEncoder, defaults: Mapping[str, Any]
) -> int:
    """Complete a file of requests; 1 if some could not be completed."""

    def check(record: Record) -> None:
        setup.check_adapter(record.adapter)
        setup.plan.check_request(record.prompt_ids, record.params)

    reader = RecordReader(encoder, defaults, arguments.adapter, stop_strings(arguments.stop), check)
    described: dict[str, Any] = {"config": setup.plan.config.model_dump(), "weights": str(setup.weights.resolve())}
    described |= {
        "sampling": repr(sorted(defaults.items())),
        "adapters": {name: a.digest.hex() for name, a in setup.adapters.items()},
    }
    described |= {name: repr(getattr(arguments, name)) for name in ("raw", "system", "adapter", "stop")}
    described["add_bos_token"] = repr(encoder.add_bos_token)
    described["max_seq_len"] = setup.plan.cache.max_seq_len
    described["cache_dtype"] = setup.plan.precision.cache_dtype
    batch = Batch(arguments.input, arguments.output, reader, arguments.strict, arguments.overwrite, described)
    with batch.open_spool() as spool:
        num_records, rejects = batch.check()
        if rejects:
            where = batch.rejects_path.name
            _warn(f"{len(rejects)} of {num_records + len(rejects)} lines are no requests, {where} says why")
        if spool.done:
            _warn(f"{len(spool.done)} of {num_records} records were completed before; going on from there")
        figures = run_batch(batch, spool, setup.build(), encoder.tokenizer, num_records)
        spool.finish()
        batch.write_rejects(rejects)
    rate = figures.num_tokens / max(figures.elapsed_s, 1e-9)
    _warn(
        f"{figures.num_records} records, {figures.num_prompt_tokens} prompt tokens, {figures.num_tokens} generated in "
        f"{figures.elapsed_s:.1f} s: {rate:.1f} tokens/s; written to {arguments.output}"
    )
    if figures.num_failed:
        _warn(f"{figures.num_failed} records could not be completed, their finish_reason is error")
    return int(figures.num_failed > 0)


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
