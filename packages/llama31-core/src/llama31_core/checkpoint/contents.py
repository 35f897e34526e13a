"""What lies in a directory: whether it is a checkpoint and nothing else, so that it may be replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
RANK = re.compile(r"rank_(0|[1-9][0-9]{0,5})")
_SIGNS = (MANIFEST_NAME, "config.json", "adapter_config.json", "rank_0")
_USUAL_NAMES = re.compile(
    r"manifest\.json|(generation_|adapter_)?config\.json"
    r"|tokenizer\.(model|json)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.\w+"
    r"|vocab\.json|merges\.txt"
    r"|(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
_RANK_FILE = re.compile(r".+\.(safetensors|ckpt)")


def check_replaceable(directory: Path) -> None:
    """Raise CheckpointError unless a directory is a checkpoint, whole or damaged, and holds nothing else.

    With a manifest it may hold what that names; without a readable one, what checkpoints usually hold. Directories of
    ranks are judged in the same way.
    """
    if not any((directory / name).exists() for name in _SIGNS):
        raise CheckpointError(
            f"{directory} is no checkpoint and is not replaced; remove it, or choose another destination"
        )
    is_known = _known_files(directory, _USUAL_NAMES)
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and RANK.fullmatch(entry.name):
            is_known_to_rank = _known_files(entry, _RANK_FILE)
            foreign = [file for file in sorted(entry.iterdir()) if not (_is_file(file) and is_known_to_rank(file.name))]
        else:
            foreign = [] if _is_file(entry) and is_known(entry.name) else [entry]
        if foreign:
            raise CheckpointError(
                f"{directory} holds {foreign[0].relative_to(directory)}, which is not of the checkpoint there, and is "
                "not replaced; move that away, or choose another destination"
            )


def _is_file(path: Path) -> bool:
    """Whether it is a file or a link, with which nothing else goes."""
    return path.is_symlink() or path.is_file()


def _known_files(directory: Path, usual: re.Pattern[str]) -> Callable[[str], bool]:
    try:
        files = read_json_object(directory / MANIFEST_NAME).get("files")
    except CheckpointError:
        files = None
    if isinstance(files, dict):
        return {*files, MANIFEST_NAME}.__contains__
    return lambda name: name == MANIFEST_NAME or usual.fullmatch(name) is not None
