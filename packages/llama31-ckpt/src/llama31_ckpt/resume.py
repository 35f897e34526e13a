"""Which files of an interrupted conversion are finished: noted in the staging directory, valid for one plan only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from llama31_core.checkpoint.staging import remove_tree, sync
from llama31_core.checkpoint.writer import WrittenFile

RECORD_NAME = ".finished-shards.json"


class ShardRecord:
    """The finished files in a staging directory, by their path in it.

    A record of another plan, or of a source that has changed since, is discarded with all files it names.
    """

    def __init__(self, directory: Path, inputs: Sequence[Path], plan: object, *, enabled: bool) -> None:
        """
        Args:
            directory: where the files are written.
            inputs: what they are made from: files and directories.
            plan: what they will hold, as `json.dumps` takes it; whatever changes a byte must change it.
            enabled: False keeps no record.
        """
        self._directory = directory
        self._path = directory / RECORD_NAME
        self._enabled = enabled
        self._plan = hashlib.sha256(json.dumps([*map(file_stats, inputs), plan]).encode()).hexdigest()
        self._finished: dict[str, WrittenFile] = {}
        self._lock = Lock()  # files are finished in several threads
        if enabled:
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            finished = {key: WrittenFile(**entry) for key, entry in content["files"].items()}
            valid = content["plan"] == self._plan
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            valid, finished = False, {}
        self._finished = {key: file for key, file in finished.items() if valid and self._is_whole(key, file)}
        for path in sorted(self._directory.rglob("*"), reverse=True):  # what is in a directory before the directory
            key = path.relative_to(self._directory).as_posix()
            if path == self._path and self._finished:
                continue
            if not any(kept == key or kept.startswith(f"{key}/") for kept in self._finished):
                remove_tree(path)

    def _is_whole(self, key: str, file: WrittenFile) -> bool:
        path = self._directory / key
        return ".." not in Path(key).parts and path.is_file() and path.stat().st_size == file.size_bytes

    def finished(self, key: str) -> WrittenFile | None:
        """The file if an earlier try wrote it whole."""
        return self._finished.get(key)

    def add(self, key: str, file: WrittenFile) -> None:
        """Note that a file is finished; it is on disk before the record says so."""
        if not self._enabled:
            return
        path = self._directory / key
        sync(path)
        sync(path.parent)
        with self._lock:
            self._finished[key] = file
            self._save()

    def _save(self) -> None:
        content = {"plan": self._plan, "files": {key: vars(file) for key, file in self._finished.items()}}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(content), encoding="utf-8")
        sync(part)
        part.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def file_stats(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a source, which tell whether it is still the same."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return [(str(path.relative_to(source.parent)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
