"""`llama31-core predict`: a prompt in, its answer out as it is generated; or a file of requests, one of results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama31_core.commands.batch import Batch, run_batch
from llama31_core.commands.engine_options import EngineSetup, add_engine_options, plan_engine
from llama31_core.commands.prompts import AnswerCollector, PromptEncoder, decode_answer
from llama31_core.commands.records import Record, RecordReader
from llama31_core.commands.sampling_options import add_sampling_options, given_options
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_tokenizer import StreamDecoder, Tokenizer

DEFAULTS: Mapping[str, Any] = {"max_tokens": 256, "temperature": 0.0}


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "predict", parents=[shared], help="complete a prompt, or a file of them", description=__doc__
    )
    parser.add_argument("model_dir", type=Path, help="a model directory, as llama31-ckpt convert writes it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what the user says")
    what.add_argument("--input", type=Path, metavar="FILE", help="JSON Lines of prompt, messages or token_ids")
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that tools/run_llama3_1.py shares."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results of --input go, as JSON Lines")
    parser.add_argument("--strict", action="store_true", help="a bad line ends the run before it begins")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--raw", action="store_true", help="complete prompts as they are, with no chat format")
    parser.add_argument("--add_bos_token", action="store_true", help="begin raw prompts with the model's bos token")
    parser.add_argument("--system", metavar="TEXT", help="what the system says first")
    add_sampling_options(parser, DEFAULTS)
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer, or write the results; figures go to stderr."""
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output go together: a file of requests and one of results")
    config = ModelConfig.from_pretrained(arguments.model_dir)
    tokenizer = Tokenizer.from_pretrained(arguments.model_dir)
    places = {} if arguments.input is not None else {"max_batch_size": max(1, given_width(arguments))}
    setup = plan_engine(arguments, arguments.model_dir, config, tokenizer, **places)
    encoder = PromptEncoder(tokenizer, arguments.raw, arguments.add_bos_token, arguments.system)
    if arguments.input is not None:
        return predict_file(arguments, setup, encoder)
    predict_prompt(setup, encoder.encode_prompt(arguments.prompt), _params(arguments), arguments.adapter)
    return 0


def given_width(arguments: argparse.Namespace) -> int:
    """Places in a batch that one prompt takes."""
    values = given_options(arguments, {})
    return max(int(values.get("n", 1)), int(values.get("num_beams", 1)))


def _params(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**given_options(arguments, DEFAULTS))


def predict_prompt(
    setup: EngineSetup, prompt_ids: list[int], params: SamplingParams, adapter: str | None, engine: Engine | None = None
) -> Engine:
    """Print one prompt's answers: a single one as it is generated, several when they are complete."""
    setup.plan.check_request(prompt_ids, params)
    engine = engine or setup.build()
    engine.add("predict", prompt_ids, params, adapter=adapter)
    decoder = StreamDecoder(setup.tokenizer)
    collector = AnswerCollector(params.n)
    started = time.perf_counter()
    while engine.has_unfinished():
        for output in engine.step():
            collector.push(output)
            if params.n == 1:
                print(decoder.push(output.token_ids), end="", flush=True)
    elapsed_s = time.perf_counter() - started
    if params.n == 1:
        print(decoder.flush())
    else:
        for index, answer in enumerate(collector.answers):
            print(f"[{index}] {decode_answer(setup.tokenizer, answer.token_ids)}")
    num_tokens = sum(len(answer.token_ids) for answer in collector.answers)
    print(f"{len(prompt_ids)} prompt tokens, {num_tokens} generated in {elapsed_s:.1f} s", file=sys.stderr)
    errors = [answer.error for answer in collector.answers if answer.error is not None]
    if errors:
        raise ConfigError(f"the model could not go on: {errors[0]}")
    return engine


def predict_file(arguments: argparse.Namespace, setup: EngineSetup, encoder: PromptEncoder) -> int:
    """Complete a file of requests; 1 if some could not be completed."""

    def check(record: Record) -> None:
        setup.check_adapter(record.adapter)
        setup.plan.check_request(record.prompt_ids, record.params)

    defaults = given_options(arguments, DEFAULTS)
    SamplingParams(**defaults)  # what is wrong for all records is said once
    reader = RecordReader(encoder, defaults, arguments.adapter, check)
    described: dict[str, Any] = {"config": setup.plan.config.model_dump(), "weights": str(setup.weights.resolve())}
    described |= {"sampling": repr(sorted(defaults.items())), "adapters": repr(setup.adapters)}
    described |= {name: repr(getattr(arguments, name)) for name in ("raw", "add_bos_token", "system", "adapter")}
    described["max_seq_len"] = setup.plan.cache.max_seq_len
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
