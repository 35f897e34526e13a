"""The commands for checkpoints over ranks: `shard`, `merge`, `reshard` and `strategy`; arguments in, files out."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from llama31_ckpt.convert import Options, Summary, convert
from llama31_ckpt.distribute import SUFFIXES, ShardOptions, distribute
from llama31_ckpt.sizes import parse_size
from llama31_ckpt.sources import Source, open_source
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.parallel.layout import Layout, TableLayout
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.strategy_file import StrategyLayout, load_strategy, save_strategy_files
from llama31_core.validation import first_problem


def add_shard(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser, "a whole checkpoint of any format", "directory to make, with a rank_N for each rank")
    _add_target(parser)
    parser.set_defaults(run=_run_shard)


def add_reshard(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser, "directory of rank_N directories", "directory to make, with a rank_N for each rank")
    parser.add_argument("--src_strategy", type=Path, help="strategy file(s) of an input without our manifests")
    _add_target(parser)
    parser.set_defaults(run=_run_reshard)


def add_merge(parser: argparse.ArgumentParser) -> None:
    _add_paths(
        parser, "directory of rank_N directories", "directory to make, or a path ending in .ckpt or .safetensors"
    )
    parser.add_argument("--src_strategy", type=Path, help="strategy file(s) of an input without our manifests")
    parser.add_argument("--weights_only", action="store_true", help="leave optimiser and loop state out")
    parser.add_argument("--max_shard_size", type=parse_size, help="start another file at this size, for instance 5GB")
    parser.add_argument("--resume", action="store_true", help="keep finished shards of a try that fails, and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    parser.set_defaults(run=_run_merge)


def add_strategy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="config.json or a directory with one")
    parser.add_argument("--output_path", type=Path, required=True, help="directory for one file for each stage")
    parser.add_argument("--format", choices=("ckpt", "json"), default="ckpt", help="protobuf or JSON (ckpt)")
    _add_mesh(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.set_defaults(run=_run_strategy)


def _add_paths(parser: argparse.ArgumentParser, source: str, destination: str) -> None:
    parser.add_argument("--input_path", type=Path, required=True, help=source)
    parser.add_argument("--output_path", type=Path, required=True, help=destination)
    parser.add_argument("--config", type=Path, help="config.json (or its directory) if the input has none beside it")


def _add_target(parser: argparse.ArgumentParser) -> None:
    _add_mesh(parser)
    parser.add_argument("--dst_strategy", type=Path, help="take the layout of strategy file(s) instead of a mesh")
    parser.add_argument("--format", choices=SUFFIXES, default="safetensors", help="of each rank's file (safetensors)")
    parser.add_argument("--prefix", default="checkpoint_", help="a rank's file is rank_N/<prefix>N.<format>")
    parser.add_argument("--workers", type=int, default=1, help="ranks that are written at a time (1)")
    parser.add_argument("--qkv_concat", action="store_true", help="stack a rank's wq, wk, wv and w1, w3 as MindFormers")
    parser.add_argument("--resume", action="store_true", help="keep finished ranks of a try that fails, and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    for axis, what in (("dp", "data"), ("cp", "context"), ("tp", "tensor"), ("pp", "pipeline")):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"{what} parallel size (1)")
    parser.add_argument("--offset", help="layers each stage has more or less than the even share, like -1,0,0,1")
    parser.add_argument("--vocab_emb_dp", action="store_true", help="every rank has the whole embedding")
    parser.add_argument("--shard_optimizer", action="store_true", help="split optimiser state over dp as well")


def _parallel(arguments: argparse.Namespace) -> ParallelConfig:
    try:
        offset = None if arguments.offset is None else tuple(int(part) for part in arguments.offset.split(","))
        return ParallelConfig(
            dp=arguments.dp,
            cp=arguments.cp,
            tp=arguments.tp,
            pp=arguments.pp,
            offset=offset,
            vocab_parallel=not arguments.vocab_emb_dp,
            shard_optimizer=arguments.shard_optimizer,
        )
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from error
    except ValueError:
        raise ConfigError(f"--offset is {arguments.offset!r}, expected numbers like -1,0,0,1") from None


def _target(arguments: argparse.Namespace, source: Source) -> Layout:
    parallel = _parallel(arguments)
    if arguments.dst_strategy is None:
        parallel.check(source.config)
        return TableLayout(source.config, parallel)
    if parallel != ParallelConfig():
        raise ConfigError("--dst_strategy says the layout; leave --dp, --cp, --tp, --pp and their like out")
    return load_strategy(arguments.dst_strategy)


def open_ranks(path: Path, strategy: Path | None, config_path: Path | None) -> Source:
    """Open a checkpoint over ranks, by its manifests or by a strategy.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    layout = None if strategy is None else load_strategy(strategy)
    source = open_source(path, config_path=config_path, layout=layout)
    if source.format != "ranks":
        source.close()
        raise CheckpointError(f"{path} is a whole checkpoint and has no rank_N directories; use shard or convert")
    return source


def _run_shard(arguments: argparse.Namespace) -> None:
    with closing(open_source(arguments.input_path, config_path=arguments.config)) as source:
        if source.format == "ranks":
            raise CheckpointError(f"{arguments.input_path} lies over ranks already; use reshard or merge")
        _distribute(arguments, source)


def _run_reshard(arguments: argparse.Namespace) -> None:
    with closing(open_ranks(arguments.input_path, arguments.src_strategy, arguments.config)) as source:
        _distribute(arguments, source)


def _distribute(arguments: argparse.Namespace, source: Source) -> None:
    layout = _target(arguments, source)
    options = ShardOptions(
        arguments.format,
        arguments.prefix,
        arguments.overwrite,
        arguments.workers,
        resume=arguments.resume,
        qkv_concat=arguments.qkv_concat or (isinstance(layout, StrategyLayout) and layout.qkv_concat),
    )
    report(distribute(source, arguments.output_path, layout, options), f"{layout.world_size} ranks")


def _run_merge(arguments: argparse.Namespace) -> None:
    with closing(open_ranks(arguments.input_path, arguments.src_strategy, arguments.config)) as source:
        options = Options(
            overwrite=arguments.overwrite,
            states=not arguments.weights_only,
            max_shard_bytes=arguments.max_shard_size,
            resume=arguments.resume,
        )
        summary = convert(source, arguments.output_path, options)
    report(summary, f"{summary.num_tensors} tensors")


def report(summary: Summary, what: str) -> None:
    """Print what was written."""
    gigabytes = summary.size_bytes / 1e9
    rate = gigabytes / max(summary.seconds, 1e-9)
    print(f"{summary.destination}: {what}, {gigabytes:.2f} GB, {summary.seconds:.1f} s ({rate:.2f} GB/s)")


def _run_strategy(arguments: argparse.Namespace) -> None:
    directory = arguments.config.parent if arguments.config.is_file() else arguments.config
    config = ModelConfig.from_pretrained(directory)
    parallel = _parallel(arguments)
    parallel.check(config)
    paths = save_strategy_files(
        arguments.output_path, config, parallel, overwrite=arguments.overwrite, suffix=f".{arguments.format}"
    )
    print(f"{arguments.output_path}: {len(paths)} strategy files for {parallel.world_size} ranks")
