"""`llama31-ckpt`: command line in, conversions and reports out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from llama31_ckpt import __version__
from llama31_ckpt.convert import Options, check_apart, convert
from llama31_ckpt.interrupts import ended_like_ctrl_c
from llama31_ckpt.lora import MergedWeights
from llama31_ckpt.lora_extract import extract_lora
from llama31_ckpt.progress import item_bar
from llama31_ckpt.quantize import add_quantize
from llama31_ckpt.report_commands import add_diff, add_inspect, add_verify
from llama31_ckpt.shard_commands import add_merge, add_reshard, add_shard, add_strategy
from llama31_ckpt.sizes import parse_size
from llama31_ckpt.sources import open_source
from llama31_core.checkpoint.staging import DestinationExistsError, check_destination
from llama31_core.errors import Llama31Error
from llama31_core.lora.adapter import read_adapter


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama31-ckpt", description="Llama checkpoints from and to any format.")
    parser.add_argument("--version", action="version", version=f"llama31-ckpt {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_convert(commands.add_parser("convert", help="convert a checkpoint", allow_abbrev=False))
    add_shard(commands.add_parser("shard", help="spread a checkpoint over ranks", allow_abbrev=False))
    add_merge(commands.add_parser("merge", help="join the ranks of a checkpoint", allow_abbrev=False))
    add_reshard(commands.add_parser("reshard", help="from one layout to another", allow_abbrev=False))
    add_strategy(commands.add_parser("strategy", help="write MindSpore's strategy files", allow_abbrev=False))
    add_inspect(commands.add_parser("inspect", help="say what a checkpoint holds", allow_abbrev=False))
    add_verify(commands.add_parser("verify", help="check hashes, shapes and values", allow_abbrev=False))
    add_diff(commands.add_parser("diff", help="compare two checkpoints of any formats", allow_abbrev=False))
    add_quantize(commands.add_parser("quantize", help="matrices of 8 or 4 bits", allow_abbrev=False))
    _add_extract_lora(commands.add_parser("extract-lora", help="a difference as a LoRA adapter", allow_abbrev=False))
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input_path", type=Path, required=True, help="HF, Meta or model directory; safetensors, .ckpt, .bin or GGUF"
    )
    parser.add_argument(
        "--output_path", type=Path, required=True, help="directory to make, or a path ending in .ckpt or .safetensors"
    )
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; each tensor keeps its own unless given")
    parser.add_argument("--reversed", action="store_true", help="write an HF directory that transformers loads")
    parser.add_argument("--qkv_concat", action="store_true", help="stack wq, wk, wv and w1, w3 as MindFormers does")
    parser.add_argument("--lora", type=Path, help="PEFT adapter directory to merge into the weights")
    parser.add_argument("--config", type=Path, help="config.json (or its directory) if the input has none beside it")
    parser.add_argument("--max_shard_size", type=parse_size, help="start another file at this size, for instance 5GB")
    parser.add_argument("--resume", action="store_true", help="keep finished shards of a try that fails, and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    parser.set_defaults(run=_run_convert)


def _add_extract_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="the checkpoint before tuning, of any format")
    parser.add_argument("tuned", type=Path, help="the checkpoint after it")
    parser.add_argument("--output_path", type=Path, required=True, help="PEFT adapter directory to make")
    parser.add_argument("--rank", type=int, default=16, help="greatest rank of the adapter's matrices (16)")
    parser.add_argument("--config", type=Path, help="config.json for a checkpoint that has none")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    parser.set_defaults(run=_run_extract_lora)


def _run_convert(arguments: argparse.Namespace) -> None:
    options = Options(
        dtype=arguments.dtype,
        naming="hf" if arguments.reversed else "mindformers",
        qkv_concat=arguments.qkv_concat,
        max_shard_bytes=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )
    with closing(open_source(arguments.input_path, config_path=arguments.config)) as source:
        if arguments.lora is not None:
            source.weights = MergedWeights(source.weights, read_adapter(arguments.lora).changes, arguments.lora)
        summary = convert(source, arguments.output_path, options)
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    gigabytes = summary.size_bytes / 1e9
    print(
        f"{summary.destination}: {summary.num_tensors} tensors, {gigabytes:.2f} GB in {summary.dtype}, "
        f"{summary.seconds:.1f} s ({gigabytes / max(summary.seconds, 1e-9):.2f} GB/s)"
    )


def _run_extract_lora(arguments: argparse.Namespace) -> None:
    with (
        closing(open_source(arguments.base, config_path=arguments.config)) as base,
        closing(open_source(arguments.tuned, config_path=arguments.config)) as tuned,
    ):
        for source in (base, tuned):
            check_apart(source.path, arguments.output_path)
        check_destination(arguments.output_path, overwrite=arguments.overwrite)
        with item_bar(len(base.weights.names()), "extract-lora") as bar:
            report = extract_lora(
                base.weights,
                tuned.weights,
                arguments.output_path,
                rank=arguments.rank,
                overwrite=arguments.overwrite,
                on_tensor=lambda name: bar.update(),
            )
    print(
        f"{arguments.output_path}: {report.num_matrices} matrices of rank {arguments.rank}, greatest error "
        f"{report.residual:.3g} where the greatest difference is {report.largest:.3g}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        with ended_like_ctrl_c():
            return int(arguments.run(arguments) or 0)
    except Llama31Error as error:
        if arguments.debug:
            raise
        advice = ", or give --overwrite" if isinstance(error, DestinationExistsError) else ""
        print(f"llama31-ckpt: error: {error}{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llama31-ckpt: error: interrupted", file=sys.stderr)
        return 130
