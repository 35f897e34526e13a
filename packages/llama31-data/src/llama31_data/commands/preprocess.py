"""`llama31-data preprocess`: records to MindRecord."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llama31_data.commands.progress import progress_bar
from llama31_data.errors import DataError
from llama31_data.manifest import Manifest, manifest_path
from llama31_data.options import PreprocessOptions
from llama31_data.pipeline import REJECTS_SUFFIX, preprocess
from llama31_data.schemas import SCHEMAS


def add_parser(subparsers: Any) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "preprocess", help="records to MindRecord", description="Conversations or plain text to MindRecord."
    )
    parser.add_argument("--dataset_type", choices=("qa", "wiki"), default="qa", help="conversations or plain text")
    parser.add_argument("--input_glob", required=True, nargs="+", help="files or globs; .json .jsonl .parquet .gz .zst")
    parser.add_argument("--model_file", required=True, help="tokenizer file or model directory")
    parser.add_argument("--seq_length", type=int, required=True, help="records have one token more")
    parser.add_argument("--output_file", required=True, help="the MindRecord to write")
    parser.add_argument("--file_partition", type=int, default=1, help="files in each MindRecord set")
    parser.add_argument("--repeat", type=int, default=1, help="times to go through the input")
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that MindFormers' script did not have; tools/llama_preprocess.py takes them too."""
    parser.add_argument(
        "--template", default="chat", help="chat (the model's own), llama3.1, or one of fschat's by name"
    )
    parser.add_argument("--schema", choices=("auto", *SCHEMAS), default="auto", help="what every record has to be")
    parser.add_argument("--packing", action="store_true", help="many samples in a record, attention kept apart")
    parser.add_argument(
        "--padding", choices=("max_length", "bucket"), default="max_length", help="how short samples end"
    )
    parser.add_argument("--buckets", type=int, nargs="+", help="lengths for --padding bucket (default: powers of two)")
    parser.add_argument("--split_long", action="store_true", help="cut long samples into several, drop nothing")
    parser.add_argument("--pad_id", type=int, help="instead of the vocabulary's pad token")
    parser.add_argument("--shards", type=int, default=1, help="MindRecord sets to deal the input out to")
    parser.add_argument("--workers", type=int, default=1, help="processes; the output is the same for any number")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where the work is done")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(arguments: argparse.Namespace) -> int:
    """Runs it and says what was written."""
    options = to_options(arguments)
    with progress_bar("records") as bar:
        manifest = preprocess(options, bar.update)
    print(summary(manifest, options.output_file))
    return 0


def to_options(arguments: argparse.Namespace) -> PreprocessOptions:
    """The run's options.

    Raises:
        DataError: one is out of range or does not go with another.
    """
    if arguments.buckets and arguments.padding != "bucket":
        raise DataError("--buckets goes with --padding bucket")
    named = {
        name: value
        for name, value in vars(arguments).items()
        if name in PreprocessOptions.__dataclass_fields__ and name not in ("buckets", "input_glob")
    }
    patterns = arguments.input_glob
    buckets = tuple(arguments.buckets or ()) if arguments.padding == "bucket" else None
    return PreprocessOptions(
        input_glob=(patterns,) if isinstance(patterns, str) else tuple(patterns), buckets=buckets, **named
    )


def summary(manifest: Manifest, output_file: str) -> str:
    """What a person wants to know of a finished run."""
    counts = manifest.counts
    lost = [
        f"{counts[name]:,} {label}"
        for name, label in (
            ("rejected", "records rejected"),
            ("truncated", "samples truncated"),
            ("split", "samples split"),
            ("dropped_turns", "leading turns dropped"),
            ("dropped_tokens", "tokens dropped"),
        )
        if counts[name]
    ]
    is_fewest = counts["written"] == -(-counts["tokens"] // (manifest.seq_length + 1))
    fewest = ", in the fewest records possible" if manifest.layout == "packed" and is_fewest else ""
    lines = [
        f"{counts['read']:,} records read, {counts['samples']:,} samples, {counts['written']:,} records written",
        f"{counts['tokens']:,} tokens, {counts['label_tokens']:,} of them trained on; {manifest.fill_rate:.2%} of the "
        f"space is filled{fewest}",
        *([", ".join(lost)] if lost else []),
        *([f"rejects: {output_file}{REJECTS_SUFFIX}"] if counts["rejected"] else []),
        f"output: {', '.join(name for entry in manifest.sets for name in entry.files)}",
        f"manifest: {manifest_path(Path(output_file))}",
    ]
    return "\n".join(lines)
