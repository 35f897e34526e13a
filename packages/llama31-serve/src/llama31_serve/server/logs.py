"""Where the log goes: standard error, or a file that begins anew at a size."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler

from llama31_serve.errors import StartError
from llama31_serve.server.settings import LogFile

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_log(level: str, file: LogFile | None) -> None:
    """Raises StartError if the file can't be written."""
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
