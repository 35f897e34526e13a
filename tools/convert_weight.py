"""MindFormers' `convert_weight.py` under its old flags: HF weights in, one MindSpore `.ckpt` out; `--reversed` back.

    convert_weight.py --model llama --input_path TORCH_CKPT_DIR --output_path {path}/MS_CKPT_NAME --dtype bf16

`llama31-ckpt convert` does the work and takes more formats; this file translates the old ways of naming paths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama31_ckpt.cli import main as run_ckpt


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_weight.py", description="Convert Llama weights between HF and MindSpore."
    )
    parser.add_argument("--model", required=True, choices=["llama"], help="the architecture")
    parser.add_argument("--reversed", action="store_true", help="MindSpore to an HF directory")
    parser.add_argument(
        "--input_path", type=Path, required=True, help="HF directory, or a file in it; a .ckpt with --reversed"
    )
    parser.add_argument(
        "--output_path", type=Path, required=True, help="the .ckpt to write; a directory with --reversed"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="each tensor keeps its own unless given")
    parser.add_argument("--qkv_concat", type=_as_bool, default=False, help="True: stack wq, wk, wv and w1, w3")
    parser.add_argument("--config", type=Path, help="config.json, for a .ckpt that has none beside it")
    return parser


def translate(arguments: argparse.Namespace) -> list[str]:
    """The `llama31-ckpt` command line for the old one."""
    source, destination = arguments.input_path, arguments.output_path
    # The old command looked at the directory of the path it was given, whether or not the file existed.
    if not source.exists() and source.parent.is_dir() and not arguments.reversed:
        source = source.parent
    # It left the suffix to MindSpore's save_checkpoint, which appends one where there is none.
    if not arguments.reversed and destination.suffix not in (".ckpt", ".safetensors"):
        destination = destination.with_name(destination.name + ".ckpt")
    command = ["convert", "--input_path", str(source), "--output_path", str(destination)]
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    command += ["--config", str(arguments.config)] if arguments.config else []
    return command + ["--reversed"] * arguments.reversed + ["--qkv_concat"] * arguments.qkv_concat


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion and return its exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.reversed and arguments.output_path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        parser.error(
            f"--reversed writes an HF directory with safetensors; --output_path {arguments.output_path} is a file"
        )
    return run_ckpt(translate(arguments))


if __name__ == "__main__":
    sys.exit(main())
