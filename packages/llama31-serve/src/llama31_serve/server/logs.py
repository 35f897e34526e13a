"""Where the log goes: standard error, or a file that begins anew at a size."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path

from llama31_serve.errors import StartError
from llama31_serve.server import access_log, status
from llama31_serve.server.settings import LogFile

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_log(level: str, file: LogFile | None, access_file: Path | None) -> None:
    """The log; the status line is in it whatever its level, the access log too from `info` on, or in a file of its own.

    Raises:
        StartError: a file that can't be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(
                RotatingFileHandler(file.path, encoding="utf-8", maxBytes=file.max_bytes, backupCount=file.count - 1)
            )
        except OSError as error:
            raise StartError(f"LogConfig.logPath {file.path}: cannot be written ({error.strerror})") from error
        handlers[0].setLevel(logging.WARNING)  # the file has the rest
    logging.basicConfig(level=level.upper(), format=FORMAT, handlers=handlers)
    status.logger.setLevel(logging.INFO)
    if access_file is not None:
        _write_access_log_to(access_file)


def _write_access_log_to(path: Path) -> None:
    try:
        to_stdout = str(path) == "-"
        handler = logging.StreamHandler(sys.stdout) if to_stdout else WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise StartError(f"--access_log {path}: cannot be written ({error.strerror})") from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.logger.addHandler(handler)
    access_log.logger.setLevel(logging.INFO)
    access_log.logger.propagate = False
