"""Encoded chunks on disk, one file each: what a killed run has done already, and how workers hand over their results.

A file is a NumPy .npz (uncompressed zip, so each member has a CRC-32), written under another name and then renamed: one
that is there is whole. It holds the digest of the raw records it came from; changed records are encoded again.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama31_data.chunks import Chunk, ChunkId
from llama31_data.encode import EncodedChunk, Reject
from llama31_data.errors import DataError, ResumableError
from llama31_data.manifest import discard


class ChunkReport(NamedTuple):
    """What is known of an encoded chunk without its tokens; `is_new` if it was not there before."""

    id: ChunkId
    counts: dict[str, int]
    first_reject: Reject | None
    is_new: bool


class Spool:
    """A directory of encoded chunks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, id: ChunkId) -> Path:
        return self.directory / f"{id.source:06d}-{id.chunk:09d}.npz"

    def find(self, chunk: Chunk) -> ChunkReport | None:
        """The report of a chunk encoded earlier from the same raw records, if it is here."""
        try:
            with np.load(self._path(chunk.id)) as file:
                meta = json.loads(bytes(file["meta"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # absent, or torn by a power cut: to be encoded
        if meta["digest"] != chunk.digest:
            return None
        return _report(chunk.id, meta["counts"], [Reject(*reject) for reject in meta["rejects"]], is_new=False)

    def save(self, chunk: Chunk, encoded: EncodedChunk) -> ChunkReport:
        """Writes a chunk's file.

        Raises:
            DataError: the disk is full or the directory is not writable.
        """
        meta = {"digest": chunk.digest, "counts": encoded.counts, "rejects": encoded.rejects}
        path = self._path(chunk.id)
        part = path.with_suffix(f".{os.getpid()}.part")
        packed = io.BytesIO()
        np.savez(
            packed,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            tokens=encoded.tokens,
            trained=encoded.trained,
            lengths=encoded.lengths,
        )
        try:
            part.write_bytes(packed.getbuffer())
            part.replace(path)
        except OSError as error:
            discard(part)
            raise ResumableError(f"{path}: cannot be written: {error.strerror}; free space and run again") from error
        return _report(chunk.id, encoded.counts, encoded.rejects, is_new=True)

    def load(self, id: ChunkId) -> EncodedChunk:
        """A chunk saved earlier.

        Raises:
            DataError: its file is missing or damaged.
        """
        try:
            with np.load(self._path(id)) as file:
                meta = json.loads(bytes(file["meta"]))
                rejects = [Reject(*reject) for reject in meta["rejects"]]
                return EncodedChunk(file["tokens"], file["trained"], file["lengths"], rejects, meta["counts"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self._path(id)}: missing or damaged ({error}); delete {self.directory} and run again"
            ) from error


def _report(id: ChunkId, counts: dict[str, int], rejects: list[Reject], *, is_new: bool) -> ChunkReport:
    return ChunkReport(id, counts, rejects[0] if rejects else None, is_new)
