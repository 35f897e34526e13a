"""`llama31-data stats`: an output's figures as JSON, and as a histogram."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama31_data.commands.progress import progress_bar
from llama31_data.manifest import write_atomically
from llama31_data.stats import collect_stats, plot_stats


def add_parser(subparsers: Any) -> None:
    """Declares the command."""
    parser = subparsers.add_parser(
        "stats", help="lengths, labels and fill rate", description="Lengths, labels and fill rate of an output."
    )
    parser.add_argument("file", help="what --output_file of preprocess named")
    parser.add_argument("--json", help="where to write the figures (default: FILE.stats.json)")
    parser.add_argument("--png", help="where to draw the histograms (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the figures and prints the short form."""
    output = Path(arguments.file)
    with progress_bar("records") as bar:
        stats = collect_stats(output, bar.update)
    path = Path(arguments.json or f"{output}.stats.json")
    write_atomically(path, json.dumps(stats, indent=2, ensure_ascii=False) + "\n")
    if arguments.png:
        plot_stats(stats, Path(arguments.png))
    print(table(stats))
    print(f"written to {path}{f' and {arguments.png}' if arguments.png else ''}")
    return 0


def table(stats: dict[str, Any]) -> str:
    """The distributions side by side."""
    rows = [("tokens a sample", "sample_tokens"), ("trained tokens a sample", "sample_label_tokens")]
    if stats["layout"] == "packed":
        rows.append(("samples a record", "samples_a_record"))
    columns = ("min", "mean", "p50", "p90", "p99", "max")
    lines = [
        f"{stats['records']:,} records, {stats['layout']} at {stats['seq_length']:,}, {stats['fill_rate']:.2%} full"
    ]
    lines.append(f"{'':24}" + "".join(f"{name:>10}" for name in columns))
    lines += [f"{label:24}" + "".join(f"{stats[name][column]:>10,}" for column in columns) for label, name in rows]
    return "\n".join(lines)
