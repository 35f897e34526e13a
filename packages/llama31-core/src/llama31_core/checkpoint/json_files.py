"""Small JSON files beside checkpoints: a path in, its object out, or one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama31_core.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: missing, too large to be what it should, no valid JSON, or no object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes, which no such file is")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content
