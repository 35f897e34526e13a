"""`llama31-data inspect`: records as text, the trained part coloured."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from llama31_data.encode import load_tokenizer
from llama31_data.errors import DataError
from llama31_data.manifest import Manifest, check_files, load_manifest
from llama31_data.reader import read_records
from llama31_data.render import render_record
from llama31_tokenizer import Tokenizer


def add_parser(subparsers: Any) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "inspect", help="show records as text", description="Records as text, the part that is trained on in green."
    )
    parser.add_argument("file", help="what --output_file of preprocess named")
    parser.add_argument("--n", type=int, default=3, help="records to show (default 3)")
    parser.add_argument("--start", type=int, default=0, help="number of the first one, from 0")
    parser.add_argument("--model_file", help="tokenizer file or model directory (default: the one it was made with)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="else [[…]] is trained on")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Shows them."""
    output = Path(arguments.file)
    manifest = load_manifest(output)
    check_files(output, manifest, hashes=False)
    tokenizer = _tokenizer(output, manifest, arguments.model_file)
    if not 0 <= arguments.start < manifest.num_records or arguments.n < 1:
        raise DataError(
            f"--start is {arguments.start} and --n {arguments.n}; {output} has records 0 to {manifest.num_records - 1}"
        )
    numbers = range(arguments.start, min(arguments.start + arguments.n, manifest.num_records))
    colour = arguments.color == "always" or (
        arguments.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    for number, record in zip(numbers, read_records(output, manifest, numbers), strict=True):
        print(render_record(number, record, tokenizer, manifest.pad_token_id, colour=colour) + "\n")
    return 0


def _tokenizer(output: Path, manifest: Manifest, model_file: str | None) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(model_file or manifest.model_file)
    except DataError as error:
        hint = "" if model_file else "; give --model_file, the tokenizer is no longer where it was"
        raise DataError(f"{error}{hint}") from error
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"--model_file {model_file or manifest.model_file}: is not the vocabulary that {output} was made with "
            f"(sha256 {tokenizer.sha256[:12]}…, the manifest has {manifest.tokenizer_sha256[:12]}…)"
        )
    return tokenizer
