"""Checkpoints of the Hugging Face Hub: `org/name` in, a local directory with its files out. Needs the `hub` extra."""

from __future__ import annotations

import re
from pathlib import Path

from llama31_core.errors import CheckpointError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_FILES = (*_WEIGHTS, "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja")


def local_checkpoint(path: Path) -> Path:
    """`path` if it exists; else the files of the Hub's repository of that name, from its cache or the network.

    Raises:
        CheckpointError: no such file, and no repository that can be had.
    """
    if path.exists():
        return path
    name = str(path)
    if not _REPOSITORY.fullmatch(name):
        raise CheckpointError(f"{path} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{path} does not exist; to get it from the Hugging Face Hub, pip install 'llama31-ckpt[hub]'"
        ) from None
    try:
        directory = Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # all of the library's own errors are one of these
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} does not exist, and the Hugging Face Hub did not give a repository of that name: {reason}; "
            "download it by other means and name its directory"
        ) from error
    if not any(file for pattern in _WEIGHTS for file in directory.glob(pattern)):
        raise CheckpointError(f"{path} of the Hugging Face Hub has no safetensors; download its files and name them")
    return directory
