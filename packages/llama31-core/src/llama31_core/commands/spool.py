"""Results of a long run as they come, kept beside the output until it is whole: so that a run that ended early goes on.

The spool is a JSON Lines file: first what the run was asked for, then a result a line, in the order of completion.
`finish` writes them to the output in the order of the input, in one rename, and removes the spool.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llama31_core.checkpoint.staging import check_destination, staged_file
from llama31_core.errors import CheckpointError, ConfigError


def spool_path(output: Path) -> Path:
    """Where the results of a run that has not ended are."""
    return output.with_name(f".{output.name}.progress")


class Spool:
    """The results of one run.

    Args:
        output: the file to make.
        run: what the run was asked for; results of another run are not taken over.
        overwrite: replace an existing output.

    Raises:
        ConfigError: the output exists or cannot be written, or another process is writing it.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], *, overwrite: bool) -> None:
        self._output = output
        self._overwrite = overwrite
        self._path = spool_path(output)
        self._places: dict[int, int] = {}  # line of the input -> offset in the spool
        _check(output, overwrite)
        try:
            self._file = self._path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"another process is writing {output}; wait for it, or choose another output") from None
        self._take_over(json.dumps({"run": run}, sort_keys=True))

    @property
    def done(self) -> frozenset[int]:
        """Lines of the input whose results are here."""
        return frozenset(self._places)

    def add(self, line: int, result: Mapping[str, Any]) -> None:
        """Keep the result of a line of the input."""
        self._places[line] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps({"line": line, "result": result}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def finish(self) -> None:
        """Write the output and remove the spool."""
        with staged_file(self._output, overwrite=self._overwrite) as part, part.open("w", encoding="utf-8") as target:
            for line in sorted(self._places):
                self._file.seek(self._places[line])
                result = json.loads(self._file.readline())["result"]
                target.write(json.dumps(result, ensure_ascii=False) + "\n")
        self._path.unlink()

    def _take_over(self, header: str) -> None:
        """Begin after the last whole line of an earlier try of the same run, or anew."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(iter(self._file.readline, b"")):
            if not line.endswith(b"\n") or (number == 0 and line.decode(errors="replace").rstrip("\n") != header):
                break
            if number > 0:
                self._places[json.loads(line)["line"]] = end
            end += len(line)
        self._file.truncate(end)
        if end == 0:
            self._file.write(header.encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._places:  # nothing to go on from
            self._path.unlink(missing_ok=True)


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """A JSON Lines file in one rename; an existing one is replaced."""
    with staged_file(path, overwrite=True) as part, part.open("w", encoding="utf-8") as target:
        target.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _check(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise ConfigError(f"{output} is a directory, expected a file")
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent} does not exist; make it, or choose another output")
    try:
        check_destination(output, overwrite=overwrite)
    except CheckpointError as error:
        raise ConfigError(f"{error}, or give --overwrite") from error
