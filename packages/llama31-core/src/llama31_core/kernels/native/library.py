"""The native kernels' library: C++ beside this file in, a shared object in the user's cache out.

It is compiled at first use, for the best instructions that the CPU has, and found again by a hash of the sources, the
compiler and its options.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from llama31_core.errors import Llama31Error
from llama31_core.kernels.native.threads import num_threads
from llama31_core.native_support import find_compiler, instruction_options, what_is_missing

SOURCES = Path(__file__).parent
_OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread")
_COMPILE_LIMIT_S = 600  # some twenty seconds on an idle core


class NativeKernelsError(Llama31Error):
    """This machine cannot run the native kernels; the portable ones do the same, slower."""


def load_library() -> Path:
    """The compiled library, built if it is not in the cache yet (some twenty seconds).

    Raises:
        ConfigError: a variable for the number of threads is not a number.
        NativeKernelsError: switched off by LLAMA31_NATIVE_KERNELS=0, or the CPU lacks an instruction, or there is
            no C++ compiler, or it failed.
    """
    reason, command = what_is_missing(), compile_command()
    if reason is not None or command is None:
        raise NativeKernelsError(reason)
    return _load(tuple(command))


@lru_cache(maxsize=1)
def _load(command: tuple[str, ...]) -> Path:
    library = _cache_directory() / _fingerprint(command) / "libllama31_kernels.so"
    if not library.exists():
        _compile(command, library)
    ctypes.CDLL(str(library)).Llama31SetNumThreads(num_threads())
    return library


def compile_command() -> list[str] | None:
    """The compiler and its options for this CPU; None without a compiler, or on a CPU that has too little."""
    compiler, instructions = find_compiler(), instruction_options()
    return None if compiler is None or instructions is None else [compiler, *_OPTIONS, *instructions]


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llama31" / "kernels"


def _fingerprint(command: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: Sequence[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        built = Path(directory) / library.name
        full_command = [*command, "-o", str(built), *map(str, sorted(SOURCES.glob("*.cc")))]
        try:
            subprocess.run(full_command, check=True, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S)
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
            raise NativeKernelsError(f"{command[0]} could not compile the native kernels: {first}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeKernelsError(f"{command[0]} could not compile the native kernels: {error}") from error
        os.replace(built, library)  # two processes may build at once: the last one wins, with the same content
