"""tools/pants: which Pants it starts, what it tells it about pip, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

LAUNCHER = Path(__file__).resolve().parents[1] / "tools" / "pants"
REPORT = (
    "import json, os, sys; print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if 'PANTS' in k}]))"
)


@pytest.fixture
def launcher() -> ModuleType:
    loader = SourceFileLoader("pants_launcher", str(LAUNCHER))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it, an empty cache, and no settings of pip or Pants."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "PANTS_", "PEX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, check=False)


def add_executable(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)


def test_without_python_39_it_says_what_to_install(bare: Path) -> None:
    result = start("--version")
    assert result.returncode == 1
    assert result.stderr.startswith("tools/pants: error: no Python 3.9")
    assert "uv python install 3.9" in result.stderr
    assert not [path for path in (bare / "cache").rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_python39_that_does_not_start_is_passed_over(bare: Path) -> None:
    add_executable(bare / "bin" / "python3.9", "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    assert start("--version").stderr.startswith("tools/pants: error: no Python 3.9")


def test_an_official_launcher_is_used_and_told_where_pip_looks(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_executable(bare / "bin" / "pants", f"#!{sys.executable}\n{REPORT}\n")
    monkeypatch.setenv("PIP_FIND_LINKS", "/first /second")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://example.invalid/simple")
    result = start("test", "::")
    assert result.returncode == 0, result.stderr
    arguments, settings = json.loads(result.stdout)
    assert arguments == ["test", "::"]
    assert json.loads(settings["PANTS_PYTHON_REPOS_FIND_LINKS"]) == ["/first", "/second"]
    assert settings["PANTS_PYTHON_REPOS_INDEXES"] == '+["https://example.invalid/simple"]'
    assert "PANTS_PEX_CLI_URL_TEMPLATE" not in settings


def test_an_official_launcher_can_be_passed_over(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_executable(bare / "bin" / "pants", f"#!{sys.executable}\n{REPORT}\n")
    monkeypatch.setenv("LLAMA31_PANTS", "own")
    assert start("--version").stderr.startswith("tools/pants: error: no Python 3.9")


def test_settings_that_are_there_already_win(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_executable(bare / "bin" / "pants", f"#!{sys.executable}\n{REPORT}\n")
    monkeypatch.setenv("PIP_FIND_LINKS", "/first")
    monkeypatch.setenv("PANTS_PYTHON_REPOS_FIND_LINKS", "['/mine']")
    _, settings = json.loads(start("list").stdout)
    assert settings["PANTS_PYTHON_REPOS_FIND_LINKS"] == "['/mine']"


def test_an_index_of_its_own_replaces_pypi(launcher: ModuleType) -> None:
    settings = launcher.repository_settings({"index-url": ["https://one.invalid"], "extra-index-url": ["https://two"]})
    assert settings["PANTS_PYTHON_REPOS_INDEXES"] == '["https://one.invalid", "https://two"]'


def test_pips_certificate_is_passed_on(launcher: ModuleType) -> None:
    assert launcher.repository_settings({"cert": ["/ca.pem"]})["SSL_CERT_FILE"] == "/ca.pem"
    assert "SSL_CERT_FILE" not in launcher.repository_settings({})


def test_another_pex_is_refused(launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "pex"
    target.write_bytes(b"not the pex that was pinned")
    monkeypatch.setattr(launcher, "run", lambda *_: None)
    with pytest.raises(launcher.LauncherError, match="expected 59084144"):
        launcher.build_pex(sys.executable, target, tmp_path)
