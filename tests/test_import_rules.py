"""Who may import whom: the rules hold, a forbidden import breaks them, in import-linter and in Pants."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
COPIED = ("packages", "tools", "3rdparty", "BUILD", "pants.toml", "pyproject.toml", "constraints.txt")

# (package, module without suffix, import statement)
FORBIDDEN = [
    ("tokenizer", "__init__", "import llama31_core"),
    ("tokenizer", "__init__", "import mindspore"),
    ("core", "config", "import llama31_tokenizer"),
    ("core", "config", "import mindspore"),
    ("core", "inference/scheduler", "import mindspore"),
    ("core", "cli", "import llama31_ckpt"),
    ("data", "cli", "import llama31_core.config"),
    ("ckpt", "cli", "import llama31_tokenizer"),
    ("ckpt", "cli", "import llama31_core.training"),
    ("serve", "server/__init__", "import llama31_data"),
    ("serve", "client", "import llama31_tokenizer"),
]
# One of each kind of rule: a run of Pants takes half a minute.
FORBIDDEN_TO_PANTS = [
    ("core", "config", "import llama31_tokenizer"),
    pytest.param("tokenizer", "__init__", "import mindspore", marks=pytest.mark.slow),
    pytest.param("serve", "client", "import llama31_core", marks=pytest.mark.slow),
]
PURE = [
    "llama31_tokenizer",
    "llama31_tokenizer.cli",
    "llama31_core",
    "llama31_core.config",
    "llama31_core.precision",
    "llama31_core.device",
    "llama31_core.native_support",
    "llama31_core.mindformers_config",
    "llama31_core.checkpoint",
    "llama31_core.inference.block_manager",
    "llama31_core.inference.draft_model",
    "llama31_core.inference.engine",
    "llama31_core.inference.engine_plan",
    "llama31_core.inference.graph_input",
    "llama31_core.inference.parallel_channel",
    "llama31_core.inference.sampling",
    "llama31_core.inference.scheduler",
    "llama31_core.inference.structured",
    "llama31_core.lora.adapter",
    "llama31_core.lora.table",
    "llama31_core.parallel",
    "llama31_core.parallel.schedule",
    "llama31_core.parallel.sequence",
    "llama31_core.parallel.strategy_file",
    "llama31_core.parallel.strategy_format",
    "llama31_core.plan",
    "llama31_core.plan.picture",
    "llama31_core.plan.search",
    "llama31_core.run_config",
    "llama31_core.training.flops",
    "llama31_core.training.metrics",
    "llama31_core.training.plot",
    "llama31_core.training.report",
    "llama31_core.training.run_plan",
    "llama31_core.training.masks",
    "llama31_core.training.pieces",
    "llama31_ckpt.cli",
    "llama31_data",
    "llama31_serve",
    "llama31_serve.cli",
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "tests", ".*")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=ignore)
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def module_file(root: Path, package: str, module: str) -> Path:
    return root / "packages" / f"llama31-{package}" / "src" / f"llama31_{package}" / f"{module}.py"


def add_import(root: Path, package: str, module: str, statement: str) -> Path:
    """Inside a function, where the rules hold too."""
    file = module_file(root, package, module)
    file.write_text(file.read_text() + f"\n\ndef _forbidden() -> None:\n    {statement}\n")
    return file


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    sources = os.pathsep.join(str(path) for path in sorted(root.glob("packages/*/src")))
    return run([sys.executable, "-c", LINT_IMPORTS, "--no-cache"], root, {"PYTHONPATH": sources})


def run(command: list[str], root: Path, extra: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **extra}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_contracts_are_kept(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_linter_finds_every_forbidden_import(copy: Path) -> None:
    for package, module, statement in FORBIDDEN:
        add_import(copy, package, module, statement)
    result = lint_imports(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    for package, module, statement in FORBIDDEN:
        importer = f"llama31_{package}.{module}".replace("/", ".").removesuffix(".__init__")
        assert f"{importer} -> {statement.removeprefix('import ')} (l." in result.stdout, result.stdout


@pytest.mark.parametrize(("package", "module", "statement"), FORBIDDEN_TO_PANTS)
def test_pants_refuses_a_forbidden_import(package: str, module: str, statement: str, copy: Path) -> None:
    """That it takes the others is seen by every run of it."""
    add_import(copy, package, module, statement)
    command = ["tools/pants", "--no-pantsd", "--no-dynamic-ui", "dependencies", "packages::"]
    result = run(command, copy, {"PANTS_BUILDROOT_OVERRIDE": str(copy)})
    assert result.returncode != 0
    assert "DependencyRule" in result.stderr, result.stderr
    assert f"llama31_{package}/{module}.py" in result.stderr, result.stderr


def test_imports_without_mindspore_and_torch_in_memory() -> None:
    program = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {name.partition('.')[0] for name in sys.modules} & {'mindspore', 'torch', 'transformers'}\n"
        "    assert not heavy, f'{module} imports {sorted(heavy)}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *PURE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
