"""What a run writes beside its sets: the list of records it could not use, and the manifest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import llama31_data
from llama31_data.errors import DataError
from llama31_data.layouts import Layout
from llama31_data.manifest import FORMAT_VERSION, Manifest, describe_file
from llama31_data.options import PreprocessOptions
from llama31_data.sources import Source
from llama31_data.spool import ChunkReport, Spool
from llama31_data.work import SetReport
from llama31_tokenizer import Tokenizer

_UNREPEATED = ("read", "rejected", "headings", "dropped_turns")
_COUNTS = (*_UNREPEATED, "samples", "truncated", "split", "dropped_tokens", "tokens", "label_tokens")


def write_rejects(path: Path, reports: list[ChunkReport], sources: list[Source], spool: Spool) -> None:
    """One JSON object a line for every record that was not used; no file if there is none."""
    path.unlink(missing_ok=True)
    rejecting = [report for report in reports if report.first_reject]
    if not rejecting:
        return
    with path.open("w", encoding="utf-8") as file:
        for report in rejecting:
            name = sources[report.id.source].path.name
            for line, reason in spool.load(report.id).rejects:
                file.write(json.dumps({"file": name, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


def make_manifest(
    options: PreprocessOptions,
    sources: list[Source],
    tokenizer: Tokenizer,
    layout: Layout,
    counts: Counter[str],
    built: list[SetReport],
    rejects: Path,
) -> Manifest:
    """The manifest of finished sets.

    Raises:
        DataError: there is too little text for one record.
    """
    totals = {name: counts[name] * (1 if name in _UNREPEATED else options.repeat) for name in _COUNTS}
    records = sum(report.entry.num_records for report in built)
    capacity = sum(int(width) * n for report in built for width, n in report.entry.records_by_width.items())
    if layout.kind == "concatenated":
        totals["dropped_tokens"] = totals["tokens"] - capacity
        totals["tokens"], totals["label_tokens"] = capacity, records * options.seq_length
    if not records:
        raise DataError(
            f"the input has {totals['dropped_tokens']} tokens, fewer than one record of {options.seq_length + 1} "
            "(seq_length + 1); use a smaller --seq_length"
        )
    files = [file for report in built for file in report.files]
    if rejects.is_file():
        files.append(describe_file(rejects))
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=llama31_data.__version__,
        dataset_type=options.dataset_type,
        template=options.template if options.dataset_type == "qa" else None,
        layout=layout.kind,
        seq_length=options.seq_length,
        columns=layout.columns,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=layout.pad_id,
        tokenizer_sha256=tokenizer.sha256,
        model_file=options.model_file,
        sources=tuple(source.path.name for source in sources),
        counts={**totals, "written": records},
        fill_rate=round(totals["tokens"] / capacity, 6),
        sets=tuple(report.entry for report in built),
        files=tuple(files),
    )
