"""Which shards of an interrupted conversion are finished: noted in the staging directory, valid for one plan only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

from llama31_core.checkpoint.staging import remove_tree, sync
from llama31_core.checkpoint.writer import TensorSpec, WrittenFile

RECORD_NAME = ".finished-shards.json"


class ShardRecord:
    """The finished shards in a staging directory.

    A record of another plan, or of a source that has changed since, is discarded with all files it names.
    """

    def __init__(
        self, directory: Path, source: Path, shards: Mapping[str, Sequence[TensorSpec]], *, enabled: bool
    ) -> None:
        self._directory = directory
        self._path = directory / RECORD_NAME
        self._enabled = enabled
        self._plan = _fingerprint(source, shards)
        self._finished: dict[str, WrittenFile] = {}
        self._lock = Lock()  # shards are finished in several threads
        if enabled:
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            finished = [WrittenFile(**entry) for entry in content["files"]]
            valid = content["plan"] == self._plan
        except (OSError, ValueError, KeyError, TypeError):
            valid, finished = False, []
        kept = {file.name: file for file in finished if valid and self._is_whole(file)}
        for path in self._directory.iterdir():
            if path.name not in kept:
                remove_tree(path)
        self._finished = kept

    def _is_whole(self, file: WrittenFile) -> bool:
        path = self._directory / file.name
        return path.is_file() and path.stat().st_size == file.size_bytes

    def finished(self, name: str) -> WrittenFile | None:
        """The shard if an earlier try wrote it whole."""
        return self._finished.get(name)

    def add(self, file: WrittenFile) -> None:
        """Note that a shard is finished; it is on disk before the record says so."""
        if not self._enabled:
            return
        sync(self._directory / file.name)
        with self._lock:
            self._finished[file.name] = file
            self._save()

    def _save(self) -> None:
        content = {"plan": self._plan, "files": [vars(file) for file in self._finished.values()]}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(content), encoding="utf-8")
        sync(part)
        part.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _fingerprint(source: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> str:
    """Changes with the source's files (name, size, time) and with anything the shards would hold."""
    tensors = {
        name: [(spec.name, spec.shape, spec.dtype.name, i) for i, spec in enumerate(specs)]
        for name, specs in shards.items()
    }
    return hashlib.sha256(json.dumps([file_stats(source), tensors]).encode()).hexdigest()


def file_stats(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a source, which tell whether it is still the same."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return [(str(path.relative_to(source.parent)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
