"""The native kernels' library: C++ beside this file in, a shared object in the user's cache out.

It is compiled at first use and found again by a hash of the sources, the compiler and its options.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from llama31_core.errors import Llama31Error
from llama31_core.kernels.native.threads import num_threads
from llama31_core.native_support import FEATURES, find_compiler, what_is_missing

SOURCES = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", *FEATURES.values())
_COMPILE_LIMIT_S = 120


class NativeKernelsError(Llama31Error):
    """This machine cannot run the native kernels; the portable ones do the same, slower."""


@lru_cache(maxsize=1)
def load_library() -> Path:
    """The compiled library, built if it is not in the cache yet (about five seconds).

    Raises:
        ConfigError: a variable for the number of threads is not a number.
        NativeKernelsError: switched off by LLAMA31_NATIVE_KERNELS=0, or the CPU lacks an instruction, or there is
            no C++ compiler, or it failed.
    """
    reason, compiler = what_is_missing(), find_compiler()
    if reason is not None or compiler is None:
        raise NativeKernelsError(reason)
    library = _cache_directory() / _fingerprint(compiler) / "libllama31_kernels.so"
    if not library.exists():
        _compile(compiler, library)
    ctypes.CDLL(str(library)).Llama31SetNumThreads(num_threads())
    return library


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llama31" / "kernels"


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256("\0".join((compiler, *OPTIONS)).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        built = Path(directory) / library.name
        command = [compiler, *OPTIONS, "-o", str(built), *map(str, sorted(SOURCES.glob("*.cc")))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S)
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
            raise NativeKernelsError(f"{compiler} could not compile the native kernels: {first}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeKernelsError(f"{compiler} could not compile the native kernels: {error}") from error
        os.replace(built, library)  # two processes may build at once: the last one wins, with the same content
