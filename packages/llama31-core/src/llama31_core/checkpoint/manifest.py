"""`manifest.json`: what a checkpoint holds and where it came from. Files in, their sha256 out, and the check of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.contents import MANIFEST_NAME as MANIFEST_NAME
from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.checkpoint.staging import staged_file
from llama31_core.checkpoint.writer import WrittenFile
from llama31_core.errors import CheckpointError

_FORMAT_VERSION = 1


def manifest_beside(path: Path) -> Path:
    """Where the manifest of a directory, or of a single file, is."""
    return path / MANIFEST_NAME if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST_NAME}")


def describe_file(path: Path) -> WrittenFile:
    """Name, sha256 and size of a file on disk."""
    try:
        with path.open("rb") as file:
            return WrittenFile(path.name, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def write_manifest(
    target: Path,
    files: Iterable[WrittenFile],
    *,
    dtype: str,
    source: Mapping[str, Any],
    tool: str,
    config: Mapping[str, Any] | None = None,
    layout: Mapping[str, Any] | None = None,
) -> Path:
    """Write the manifest of a finished checkpoint.

    Args:
        target: the directory (its `manifest.json` is written) or the manifest's own path.
        files: what it holds; `describe_file` gives entries for files written elsewhere.
        dtype: `float32`, `bfloat16` or `float16`.
        source: where the weights came from, for instance `{"format": "gguf", "name": …, "sha256": …}`.
        tool: name and version of the program that wrote it.
        config: the content of a config.json, for a checkpoint that is one file and has none beside it.
        layout: which parts of a checkpoint over several ranks lie here (see `sharded`).
    """
    content = {
        "format_version": _FORMAT_VERSION,
        "tool": tool,
        "source": dict(source),
        "dtype": dtype,
        "files": {file.name: {"sha256": file.sha256, "size_bytes": file.size_bytes} for file in files},
    }
    if config is not None:
        content["config"] = dict(config)
    if layout is not None:
        content["layout"] = dict(layout)
    path = target / MANIFEST_NAME if target.is_dir() else target
    with staged_file(path, overwrite=True) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest.

    Raises:
        CheckpointError: missing, no valid JSON, or not a manifest of this form.
    """
    content = read_json_object(path)
    files = content.get("files")
    if not isinstance(files, dict) or content.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(f"{path} is no manifest of format_version {_FORMAT_VERSION}")
    for name, entry in files.items():
        if Path(name).name != name or not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise CheckpointError(f"{path}: entry {name!r} must be a plain file name with a sha256")
    return content


def manifest_problems(path: Path) -> list[str]:
    """How the files beside a manifest differ from what it says; empty if they do not."""
    problems = []
    for name, entry in read_manifest(path)["files"].items():
        file = path.parent / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif describe_file(file).sha256 != entry["sha256"]:
            problems.append(f"{name} has another sha256 than the manifest says")
    return problems
