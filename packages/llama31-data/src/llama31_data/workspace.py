"""The run's own directory beside its output, `.NAME.partial`: kept when a run is killed, moved into place when done.

States of an output, whatever happens and whenever:
    only `.NAME.partial`   killed while encoding or building; the same command goes on from there
    some files moved       killed while moving; `.NAME.partial/ready.json` lists what is still to be moved
    manifest in place      complete; the manifest is moved last
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from llama31_data.errors import DataError, ResumableError
from llama31_data.manifest import load_manifest, manifest_path, write_atomically

logger = logging.getLogger(__name__)


class Workspace:
    """Locked while it is open; use as a context manager."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.directory = output.with_name(f".{output.name}.partial")
        self.chunks = self.directory / "chunks"
        self.files = self.directory / "files"
        self._ready = self.directory / "ready.json"
        self._lock: IO[str] | None = None

    def open(self, fingerprint: dict[str, object]) -> Workspace:
        """Makes the directory, or takes up the one that a run with the same fingerprint left.

        Raises:
            DataError: another run is at work there, or the place is not writable.
        """
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(exist_ok=True)
            self._lock = (self.directory / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise DataError(
                f"--output_file {self.output}: another run is writing it; wait for it or choose another name"
            ) from error
        except OSError as error:
            self._close()
            raise DataError(f"--output_file {self.output}: cannot be written: {error.strerror}") from error
        plan = self.directory / "plan.json"
        wanted = json.dumps(fingerprint, sort_keys=True)
        if not plan.is_file() or plan.read_text(encoding="utf-8") != wanted:
            if plan.is_file():
                logger.warning("%s is from a run with other options or input; starting anew", self.directory)
            for path in (self._ready, plan):
                path.unlink(missing_ok=True)
            for directory in (self.chunks, self.files):
                shutil.rmtree(directory, ignore_errors=True)
            self.chunks.mkdir()
            self.files.mkdir()
            write_atomically(plan, wanted)
        return self

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def is_ready(self) -> bool:
        """Whether all files are built and at most moving is left."""
        return self._ready.is_file()

    def mark_ready(self, names: Iterable[str]) -> None:
        """Records that `files/` holds the complete output, to be moved in this order."""
        write_atomically(self._ready, json.dumps(list(names)))

    def publish(self) -> None:
        """Moves the files beside the output path, the manifest last, and removes the directory.

        Raises:
            DataError: a file cannot be moved.
        """
        names: list[str] = json.loads(self._ready.read_text(encoding="utf-8"))
        manifest = manifest_path(self.output)
        try:
            if (self.files / manifest.name).is_file():
                self._remove_old(keep=names)
            for name in [*(name for name in names if name != manifest.name), manifest.name]:
                if (self.files / name).is_file():
                    (self.files / name).replace(self.output.with_name(name))
            _sync_directory(self.output.parent)
        except OSError as error:
            raise ResumableError(f"{self.output}: cannot be put in place: {error.strerror}; run again") from error
        self.discard()

    def _remove_old(self, keep: list[str]) -> None:
        """The manifest of an output that is being overwritten goes first, then files that the new output has not."""
        manifest = manifest_path(self.output)
        if not manifest.is_file():
            return
        try:
            old = [entry.name for entry in load_manifest(self.output).files]
        except DataError:
            old = []  # not ours, or of another version: it is replaced, what it lists is left alone
        manifest.unlink()
        for name in set(old) - set(keep):
            self.output.with_name(name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the directory with all that is in it."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
