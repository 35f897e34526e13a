"""Nothing half-written is ever visible: destination in, a hidden place beside it to write to, one rename at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama31_core.checkpoint.contents import check_replaceable
from llama31_core.errors import CheckpointError


class DestinationExistsError(CheckpointError):
    """A destination is taken and was not to be replaced."""


def staging_path(destination: Path) -> Path:
    """Where `destination` is written before it is renamed into place; the same for every try."""
    return destination.with_name(f".{destination.name}.part")


def check_destination(destination: Path, *, overwrite: bool = False) -> None:
    """See that `destination` may be written; an empty directory counts as none.

    Raises:
        DestinationExistsError: it exists, and `overwrite` is not given.
        CheckpointError: it is a directory with anything but a checkpoint in it, or one that the process is in.
    """
    try:
        if destination.is_symlink() or destination.is_file():
            taken = True
        else:
            taken = destination.is_dir() and any(destination.iterdir())
        if taken and not overwrite:
            raise DestinationExistsError(f"{destination} exists; remove it, or choose another destination")
        here, place = Path.cwd(), destination.resolve()
        if place == here or place in here.parents:
            raise CheckpointError(f"{destination} is the current directory or holds it; choose another destination")
        if taken and destination.is_dir() and not destination.is_symlink():
            check_replaceable(destination)
    except OSError as error:
        raise write_error(destination, error) from error


@contextmanager
def staged_directory(destination: str | Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `destination` when the block ends without an error.

    Args:
        destination: the directory to make; its parents are made too.
        overwrite: replace an existing checkpoint, in the moment of the rename.
        resume: keep what was written if the block fails, and begin with what an earlier try left.

    Raises:
        CheckpointError: the destination exists, cannot be written, or another process is writing it.
    """
    destination = Path(destination).absolute()
    _check_directory(destination, overwrite)
    part = staging_path(destination)
    with _locked(part):
        try:
            if not resume:
                remove_tree(part)
            part.mkdir(exist_ok=True)
            yield part
            for path in part.rglob("*"):
                sync(path)
            sync(part)
            _check_directory(destination, overwrite)  # it may have got other files meanwhile
            _replace(part, destination)
        except BaseException as error:
            if not resume:
                remove_tree(part)
            if isinstance(error, OSError):
                raise write_error(destination, error) from error
            raise


def _check_directory(destination: Path, overwrite: bool) -> None:
    check_destination(destination, overwrite=overwrite)
    if destination.is_file() and not destination.is_symlink():
        raise CheckpointError(f"{destination} is a file, expected a directory")


@contextmanager
def staged_file(destination: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path to write, which becomes the file `destination` when the block ends without an error.

    Raises:
        CheckpointError: the destination exists, cannot be written, or another process is writing it.
    """
    destination = Path(destination).absolute()
    check_destination(destination, overwrite=overwrite)
    if destination.is_dir():
        raise CheckpointError(f"{destination} is a directory, expected a file")
    part = staging_path(destination)
    with _locked(part):
        try:
            yield part
            sync(part)
            part.replace(destination)
            sync(destination.parent)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise write_error(destination, error) from error
            raise


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Holds a lock file beside `part`, so that two writers of one destination do not mix."""
    made = _make_parents(part.parent)
    lock = part.with_name(part.name + ".lock")
    try:
        file = lock.open("w")
    except OSError as error:
        raise write_error(part, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino != lock.stat().st_ino:  # its last holder took the file away meanwhile
                raise BlockingIOError
        except OSError:
            raise CheckpointError(f"another process is writing {part}; wait for it or choose another place") from None
        try:
            yield
        except BaseException:
            lock.unlink(missing_ok=True)
            for directory in made:
                if not any(directory.iterdir()):
                    directory.rmdir()
            raise
        lock.unlink(missing_ok=True)


def _make_parents(directory: Path) -> list[Path]:
    """Make `directory` and return what had to be made, innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(directory, error) from error
    return missing


def _replace(part: Path, destination: Path) -> None:
    old = destination.with_name(f".{destination.name}.old")
    if destination.is_symlink() or destination.exists():
        remove_tree(old)
        try:
            destination.rename(old)
            part.rename(destination)
        except BaseException:
            if not (destination.is_symlink() or destination.exists()):
                old.rename(destination)
            raise
    else:
        part.rename(destination)
    sync(destination.parent)
    remove_tree(old)


def remove_tree(path: Path) -> None:
    """Remove a file or a directory with all in it; nothing if it is not there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What to tell the user when writing `path` failed."""
    no_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free space or choose another place" if no_room else "check the path and its permissions"
    return CheckpointError(f"{path} cannot be written: {error.strerror or error}; {advice}")
