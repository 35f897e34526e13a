"""A whole run: options in, a MindRecord output with its manifest out, or nothing.

Encode every chunk into the spool (parallel), build every set from it (behind the encoding, or parallel by shard), write
manifest and rejects, move everything into place. See workspace.py for what a killed run leaves, and chunks.py for why
it ends the same.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import llama31_data
from llama31_data.chunks import ChunkId
from llama31_data.encode import Encoder, encoder_for
from llama31_data.errors import DataError, ResumableError
from llama31_data.finish import make_manifest, write_rejects
from llama31_data.layouts import Layout
from llama31_data.local_engine import LocalEngine
from llama31_data.manifest import (
    Manifest,
    check_files,
    load_manifest,
    manifest_path,
    write_atomically,
)
from llama31_data.options import PreprocessOptions
from llama31_data.sources import Source, find_sources
from llama31_data.spool import ChunkReport, Spool
from llama31_data.work import BUILT_SUFFIX, Engine, SetTask
from llama31_data.workspace import Workspace

logger = logging.getLogger(__name__)
REJECTS_SUFFIX = ".rejects.jsonl"

Progress = Callable[[int], object]
"""Called with how many more records were read."""


def preprocess(options: PreprocessOptions, progress: Progress = lambda records: None) -> Manifest:
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
                _Run(options, sources, encoder, workspace, progress).execute()
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


@dataclass
class _Run:
    """From sources to a workspace that is ready to be published."""

    options: PreprocessOptions
    sources: list[Source]
    encoder: Encoder
    workspace: Workspace
    progress: Progress
    reports: list[ChunkReport] = field(default_factory=list)

    def execute(self) -> None:
        """Encodes, builds, and writes what goes beside the sets."""
        engine = self._engine()
        layout = self.options.layout(_pad_id(self.options, self.encoder))
        encoded = self._watch(engine.encode(self.sources, self.options.recipe, self.workspace.chunks))
        if isinstance(engine, LocalEngine) and self._builds_while_encoding(layout):
            self._forget_sets()
            built = [engine.build_behind(encoded, self._task(self.workspace.output.name, (), layout))]
        else:
            for _ in encoded:
                pass
            self._check_samples()
            if any(report.is_new for report in self.reports):
                self._forget_sets()
            built = list(engine.build(self._tasks(layout)))
        self._check_samples()
        output = self.workspace.output
        rejects = self.workspace.files / f"{output.name}{REJECTS_SUFFIX}"
        write_rejects(rejects, self.reports, self.sources, Spool(self.workspace.chunks))
        tokenizer, counts = self.encoder.tokenizer, self._counts()
        manifest = make_manifest(self.options, self.sources, tokenizer, layout, counts, built, rejects)
        path = self.workspace.files / manifest_path(output).name
        write_atomically(path, manifest.to_json())
        self.workspace.mark_ready([entry.name for entry in manifest.files] + [path.name])

    def _engine(self) -> Engine:
        if self.options.engine == "ray":
            from llama31_data.ray_engine import RayEngine

            return RayEngine(self.options.workers)
        return LocalEngine(self.options.workers)

    def _watch(self, encoded: Iterator[ChunkReport]) -> Iterator[ChunkId]:
        """Notes every report on its way; the first bad record of a strict run ends it."""
        for report in encoded:
            if self.options.strict and report.first_reject:
                raise DataError(f"{self._why(report)} (--strict)")
            self.reports.append(report)
            self.progress(report.counts["read"])
            yield report.id

    def _builds_while_encoding(self, layout: Layout) -> bool:
        """Whether the chunks of the one set are needed in the order in which they come, and each but once."""
        return self.options.shards == self.options.repeat == 1 and layout.kind != "buckets"

    def _forget_sets(self) -> None:
        """Sets that an earlier run built may have been from other records."""
        for path in self.workspace.files.glob(f"*{BUILT_SUFFIX}"):
            path.unlink()

    def _tasks(self, layout: Layout) -> list[SetTask]:
        return [self._task(name, ids, layout) for name, ids in self._shards()]

    def _task(self, name: str, ids: Iterable[ChunkId], layout: Layout) -> SetTask:
        options = self.options
        path = self.workspace.files / name
        return SetTask(self.workspace.chunks, ids, layout, options.repeat, path, options.file_partition)

    def _shards(self) -> Iterator[tuple[str, tuple[ChunkId, ...]]]:
        """Name and chunks of each set; chunks are dealt out in turn."""
        name, shards = self.workspace.output.name, self.options.shards
        if shards == 1:
            yield name, tuple(report.id for report in self.reports)
            return
        if shards > len(self.reports):
            raise DataError(
                f"--shards is {shards}, but the input has {len(self.reports)} chunks (of up to 1,024 records); "
                f"allowed are 1 to {len(self.reports)}"
            )
        for shard in range(shards):
            yield f"{name}-{shard:05d}-of-{shards:05d}", tuple(report.id for report in self.reports[shard::shards])

    def _counts(self) -> Counter[str]:
        counts = Counter[str]()
        for report in self.reports:
            counts.update(report.counts)
        return counts

    def _check_samples(self) -> None:
        """A run without samples is an error that says why the first record was not used."""
        counts = self._counts()
        if counts["samples"]:
            return
        rejecting = next((report for report in self.reports if report.first_reject), None)
        if rejecting is None:
            names = ", ".join(str(source.path) for source in self.sources[:3])
            raise DataError(f"{names}: no record in it, nothing to write")
        why = self._why(rejecting)
        hint = "; a larger --seq_length is needed" if "seq_length + 1" in why else ""
        raise DataError(
            f"none of {counts['read']} records can be used at --seq_length {self.options.seq_length}, the first "
            f"because {why}{hint}"
        )

    def _why(self, report: ChunkReport) -> str:
        assert report.first_reject is not None
        return f"{self.sources[report.id.source].path}:{report.first_reject.line}: {report.first_reject.reason}"


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
