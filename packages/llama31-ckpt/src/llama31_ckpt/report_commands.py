"""The commands that only look: `inspect`, `verify` and `diff`; arguments in, a text or JSON report out."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from llama31_ckpt.difference import compare_weights
from llama31_ckpt.inspection import inspect_source, tensor_bytes
from llama31_ckpt.progress import byte_bar
from llama31_ckpt.sources import open_source
from llama31_ckpt.verification import verify_source
from llama31_core.checkpoint.reader import Weights


def add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.set_defaults(run=_run_inspect)


def add_verify(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.set_defaults(run=_run_verify)


def add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="a checkpoint of any format")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--tolerance", type=float, default=0.0, help="greatest |a - b| that counts as the same (0)")
    parser.add_argument("--config", type=Path, help="config.json for a checkpoint that has none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_diff)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a checkpoint of any format")
    parser.add_argument("--config", type=Path, help="config.json (or its directory) if the checkpoint has none")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_inspect(arguments: argparse.Namespace) -> int:
    source = open_source(arguments.path, config_path=arguments.config)
    with closing(source):
        report = inspect_source(source)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    print(f"{report.path} ({report.format}): {report.model}")
    print(f"{report.num_parameters / 1e9:.3f} billion parameters, {report.size_bytes / 1e9:.3f} GB")
    for dtype, count in report.dtypes.items():
        print(f"  {dtype}: {count:,} elements")
    if report.ignored:
        print(f"  {len(report.ignored)} entries are no weights, for instance {report.ignored[0]}")
    if report.layout is not None:
        print("layout: " + json.dumps(report.layout))
    print("config: " + ("none beside the weights" if report.config is None else json.dumps(report.config)))
    if arguments.tensors:
        rows = [(t.name, str(list(t.shape)), t.dtype, f"{t.size_bytes:,}", t.stored_name) for t in report.tensors]
        _print_table(("tensor", "shape", "dtype", "bytes", "stored as"), rows)
    return 0


def _run_verify(arguments: argparse.Namespace) -> int:
    source = open_source(arguments.path, config_path=arguments.config)
    with closing(source), byte_bar(_size_bytes(source.weights), "verify") as bar:
        problems, unchecked = verify_source(source, bar.update)
    if arguments.json:
        print(json.dumps({"path": str(arguments.path), "problems": problems, "unchecked": unchecked}, indent=2))
    else:
        for line in problems:
            print(f"problem: {line}")
        for line in unchecked:
            print(f"note: {line}", file=sys.stderr)
        print(f"{arguments.path}: {len(problems)} problems")
    return 1 if problems else 0


def _run_diff(arguments: argparse.Namespace) -> int:
    a = open_source(arguments.a, config_path=arguments.config)
    with closing(a):
        b = open_source(arguments.b, config_path=arguments.config)
        with closing(b), byte_bar(_size_bytes(a.weights), "diff") as bar:
            report = compare_weights(a.weights, b.weights, bar.update)
    same = report.within(arguments.tolerance)
    if arguments.json:
        # JSON has no infinity: a difference that is none stands as null.
        tensors = [
            asdict(t) | ({} if math.isfinite(t.max_difference) else {"max_difference": None}) for t in report.tensors
        ]
        print(json.dumps({**asdict(report), "tensors": tensors, "same": same}, indent=2))
    else:
        for label, names in (("a", report.only_in_a), ("b", report.only_in_b)):
            for name in names:
                print(f"only in {label}: {name}")
        differing = [t for t in report.tensors if t.num_differing or t.note]
        rows = [
            (t.name, f"{t.max_difference:.3g}", f"{t.max_value:.3g}", f"{t.num_differing:,}", t.note) for t in differing
        ]
        if rows:
            _print_table(("tensor", "max |a-b|", "max |a|", "differing", "note"), rows)
        verdict = "same" if same else "not the same"
        print(f"{len(report.tensors)} tensors in both, {verdict} within {arguments.tolerance:g}")
    return 0 if same else 1


def _size_bytes(weights: Weights) -> int:
    return sum(tensor_bytes(weights, name) for name in weights.names())


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
