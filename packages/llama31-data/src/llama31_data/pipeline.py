"""A whole run: options in, a MindRecord output with its manifest out, or nothing.

Encode every chunk into the spool (parallel), build every set from it (parallel by shard), write manifest and rejects,
move everything into place. See workspace.py for what a killed run leaves, and chunks.py for why it ends the same.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import llama31_data
from llama31_data.chunks import ChunkId
from llama31_data.encode import Encoder, encoder_for
from llama31_data.errors import DataError, ResumableError
from llama31_data.local_engine import LocalEngine
from llama31_data.manifest import (
    FORMAT_VERSION,
    Manifest,
    check_files,
    describe_file,
    load_manifest,
    manifest_path,
    write_atomically,
)
from llama31_data.options import PreprocessOptions
from llama31_data.sources import Source, find_sources
from llama31_data.spool import ChunkReport, Spool
from llama31_data.work import Engine, SetReport, SetTask
from llama31_data.workspace import Workspace

logger = logging.getLogger(__name__)
REJECTS_SUFFIX = ".rejects.jsonl"

Progress = Callable[[str, int], object]
"""Called with what was done ("records" or "sets") and how many more of it."""

_UNREPEATED = ("read", "rejected", "headings", "dropped_turns")
_COUNTS = (*_UNREPEATED, "samples", "truncated", "split", "dropped_tokens", "tokens", "label_tokens")


def preprocess(options: PreprocessOptions, progress: Progress = lambda what, number: None) -> Manifest:
    """Runs the pipeline, or goes on with a run of the same options that was killed.

    Raises:
        DataError: bad options, input, tokenizer or output place. A run that bad input ends leaves nothing; one that ran
            out of disk leaves its directory, so that it can go on.
    """
    output = Path(options.output_file)
    sources = find_sources(options.input_glob, plain_text=options.dataset_type == "wiki")
    encoder = encoder_for(options.recipe)
    workspace = Workspace(output)
    if not options.overwrite and not workspace.is_ready:
        _refuse_existing(output)
    with workspace.open(_fingerprint(options, sources, encoder)):
        if not workspace.is_ready:
            try:
                _build(options, sources, encoder, workspace, progress)
            except DataError as error:
                if not isinstance(error, ResumableError):
                    workspace.discard()
                raise
        workspace.publish()
    manifest = load_manifest(output)
    check_files(output, manifest, hashes=False)
    return manifest


def _refuse_existing(output: Path) -> None:
    for path in (output, manifest_path(output)):
        if path.exists():
            raise DataError(f"{path}: exists; give --overwrite to replace it, or another --output_file")


def _fingerprint(options: PreprocessOptions, sources: list[Source], encoder: Encoder) -> dict[str, object]:
    """What must not change between a run and its resumption. Records are compared chunk by chunk beside this."""
    kept = {
        name: value
        for name, value in asdict(options).items()
        if name not in ("workers", "engine", "overwrite", "strict")
    }
    files = [[str(source.path.resolve()), source.path.stat().st_size] for source in sources]
    return {
        **kept,
        "sources": files,
        "tokenizer_sha256": encoder.tokenizer.sha256,
        "tool_version": llama31_data.__version__,
    }


def _build(
    options: PreprocessOptions, sources: list[Source], encoder: Encoder, workspace: Workspace, progress: Progress
) -> None:
    engine = _engine(options)
    reports = _encode_all(options, sources, engine, workspace, progress)
    counts = Counter[str]()
    for report in reports:
        counts.update(report.counts)
    if not counts["samples"]:
        raise DataError(_nothing_left(reports, sources, options))
    layout = options.layout(_pad_id(options, encoder))
    tasks = [
        SetTask(workspace.chunks, tuple(ids), layout, options.repeat, workspace.files / name, options.file_partition)
        for name, ids in _shards(options, reports)
    ]
    built = []
    for report_of_set in engine.build(tasks):
        built.append(report_of_set)
        progress("sets", 1)
    rejects = workspace.files / f"{workspace.output.name}{REJECTS_SUFFIX}"
    _write_rejects(rejects, reports, sources, Spool(workspace.chunks))
    manifest = _manifest(options, sources, encoder, counts, built, rejects)
    path = workspace.files / manifest_path(workspace.output).name
    write_atomically(path, manifest.to_json())
    workspace.mark_ready([entry.name for entry in manifest.files] + [path.name])


def _engine(options: PreprocessOptions) -> Engine:
    if options.engine == "ray":
        from llama31_data.ray_engine import RayEngine

        return RayEngine(options.workers)
    return LocalEngine(options.workers)


def _encode_all(
    options: PreprocessOptions, sources: list[Source], engine: Engine, workspace: Workspace, progress: Progress
) -> list[ChunkReport]:
    reports = []
    for report in engine.encode(sources, options.recipe, workspace.chunks):
        if options.strict and report.first_reject:
            path = sources[report.id.source].path
            raise DataError(f"{path}:{report.first_reject.line}: {report.first_reject.reason} (--strict)")
        reports.append(report)
        progress("records", report.counts["read"])
    return reports


def _nothing_left(reports: list[ChunkReport], sources: list[Source], options: PreprocessOptions) -> str:
    read = sum(report.counts["read"] for report in reports)
    first = next(((report, report.first_reject) for report in reports if report.first_reject), None)
    if not first:
        return f"{', '.join(str(source.path) for source in sources[:3])}: no record in it, nothing to write"
    report, reject = first
    hint = "; a larger --seq_length is needed" if "seq_length + 1" in reject.reason else ""
    return (
        f"none of {read} records can be used at --seq_length {options.seq_length}, the first because "
        f"{sources[report.id.source].path}:{reject.line}: {reject.reason}{hint}"
    )


def _pad_id(options: PreprocessOptions, encoder: Encoder) -> int:
    tokenizer = encoder.tokenizer
    for candidate in (options.pad_id, tokenizer.pad_id, tokenizer.eos_id):
        if candidate is not None:
            if not 0 <= candidate < tokenizer.vocab_size:
                raise DataError(
                    f"--pad_id is {candidate}, allowed are 0 to {tokenizer.vocab_size - 1} (the vocabulary)"
                )
            return candidate
    raise DataError(f"--model_file {options.model_file}: has no pad and no end-of-text token; give --pad_id")


def _shards(options: PreprocessOptions, reports: list[ChunkReport]) -> Iterator[tuple[str, list[ChunkId]]]:
    """Name and chunks of each set; chunks are dealt out in turn."""
    name = Path(options.output_file).name
    if options.shards > len(reports):
        raise DataError(
            f"--shards is {options.shards}, but the input has {len(reports)} chunks (of up to 1,024 records); "
            f"allowed are 1 to {len(reports)}"
        )
    for shard in range(options.shards):
        ids = [report.id for report in reports[shard :: options.shards]]
        yield (name if options.shards == 1 else f"{name}-{shard:05d}-of-{options.shards:05d}"), ids


def _write_rejects(path: Path, reports: list[ChunkReport], sources: list[Source], spool: Spool) -> None:
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


def _manifest(
    options: PreprocessOptions,
    sources: list[Source],
    encoder: Encoder,
    counts: Counter[str],
    built: list[SetReport],
    rejects: Path,
) -> Manifest:
    layout = options.layout(_pad_id(options, encoder))
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
    tokenizer = encoder.tokenizer
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
