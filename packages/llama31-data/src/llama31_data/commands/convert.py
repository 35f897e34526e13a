"""`llama31-data convert`: Alpaca records to conversations."""

from __future__ import annotations

import argparse
from typing import Any

from llama31_data.commands.progress import progress_bar
from llama31_data.convert import convert_alpaca


def add_parser(subparsers: Any) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "convert", help="Alpaca records to conversations", description="Alpaca records to ShareGPT conversations."
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, which tools/alpaca_converter.py shares."""
    parser.add_argument(
        "--data_path", default="alpaca-data.json", help="JSON, JSON Lines or Parquet, may be .gz or .zst"
    )
    parser.add_argument("--output_path", default="alpaca-data-conversation.json", help="JSON file to write")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(arguments: argparse.Namespace) -> int:
    """Runs it and says what was written."""
    with progress_bar("records") as bar:
        report = convert_alpaca(
            arguments.data_path,
            arguments.output_path,
            strict=arguments.strict,
            overwrite=arguments.overwrite,
            progress=bar.update,
        )
    print(f"{report.written} conversations written to {arguments.output_path}")
    if report.rejects_file:
        print(f"{len(report.rejects)} records could not be used, see {report.rejects_file}")
    return 0
