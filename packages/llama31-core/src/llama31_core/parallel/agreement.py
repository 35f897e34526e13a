"""Whether all ranks are set to do the same: a digest or a problem of each in, one error on all of them out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from mindspore import Tensor

from llama31_core.checkpoint.sharded import rank_directories, read_rank_layout
from llama31_core.errors import AgreedError
from llama31_core.parallel.groups import Group
from llama31_core.parallel.transport import transport

_MAX_BYTES = 1024
_WHOLE_BYTES = 1 << 22


def exchange_texts(group: Group, text: str) -> list[str]:
    """The texts of all ranks, in their order, 1,024 bytes of each; they go around as float32, which all devices add."""
    if group.is_alone:
        return [text]
    own = np.zeros((1, _MAX_BYTES), np.float32)
    encoded = np.frombuffer(text.encode()[:_MAX_BYTES], np.uint8)
    own[0, : len(encoded)] = encoded
    rows = transport().all_gather(group)(Tensor(own)).asnumpy().round().astype(np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def agree(group: Group, facts: Mapping[str, str], problem: str = "") -> None:
    """See that every rank got this far, and with the same facts; all ranks must call this, those with a problem too.

    Args:
        facts: what must be the same, as digests of some characters, by what messages call it.
        problem: why this rank cannot go on.

    Raises:
        AgreedError: the same on every rank, naming ranks.
    """
    problems = exchange_texts(group, problem)
    if problem and len(set(problems)) == 1:
        raise AgreedError(problem)
    for rank, text in zip(group.ranks, problems, strict=True):
        if text:
            raise AgreedError(f"rank {rank}: {text}")
    for name, fact in facts.items():
        found = exchange_texts(group, fact)
        common, _ = Counter(found).most_common(1)[0]
        others = [rank for rank, text in zip(group.ranks, found, strict=True) if text != common]
        if others:
            listed = ", ".join(map(str, others[:10])) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
            raise AgreedError(
                f"ranks do not agree on {name}: rank {listed} of {group.size} has another one; give all ranks the same"
            )


def digest_of_checkpoint(path: Path, rank: int) -> str:
    """Of what must be the same everywhere: the files of a weight file or a directory; a rank's own directory in it says
    which checkpoint it is a part of."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    split = read_rank_layout(path / f"rank_{rank}").checkpoint if rank in rank_directories(path) else ""
    return digest_of(digest_of_files(files) + split)


def digest_of(text: str) -> str:
    """Of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Of names, sizes and contents; of files above 8 MiB the first and the last 4 MiB, so that it takes no time."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_WHOLE_BYTES))
            file.seek(max(_WHOLE_BYTES, size - _WHOLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:32]
